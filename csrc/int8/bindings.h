// The int8 kernels as Python functions; included by register.cpp alone.
#pragma once
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "../common/call.h"
#include "../common/dispatch.h"
#include "params.h"

namespace llmkern {

LLMKERN_KERNEL(int8_pack, Int8PackParams)
LLMKERN_KERNEL(int8_linear, Int8LinearParams)
LLMKERN_KERNEL(quantize_rows, QuantizeRowsParams)

inline void fill_int8_linear(Int8LinearParams& p, void* const* addresses) {
  p.x = addresses[0], p.packed = addresses[1], p.weight_scale = static_cast<const float*>(addresses[2]);
  p.bias = addresses[3], p.out = addresses[4];
}

inline void run_int8_linear(const Int8LinearParams& plan) {
  Int8LinearParams p = plan;
  bool accepted = true;
  p.accepted = &accepted;
  int8_linear(p);
  if (!accepted) throw std::invalid_argument("int8_linear: packed: not from int8_pack of this instruction set");
}

inline void bind_int8(pybind11::module_& m) {
  namespace py = pybind11;
  m.def(
      "int8_packed_bytes",
      [](int64_t outputs, int64_t depth) {
        int64_t bytes = 0;
        int8_pack({nullptr, nullptr, outputs, depth, 1, &bytes});
        return bytes;
      },
      "How much memory int8_pack writes.");
  m.def(
      "int8_pack",
      [](uintptr_t weight, uintptr_t packed, int64_t outputs, int64_t depth, int threads) {
        int64_t bytes = 0;
        int8_pack({reinterpret_cast<const int8_t*>(weight), reinterpret_cast<void*>(packed), outputs, depth, threads,
                   &bytes});
      },
      py::call_guard<py::gil_scoped_release>());
  py::class_<Int8LinearParams>(m, "Int8LinearPlan")
      .def(py::init([](int64_t rows, int64_t outputs, int64_t depth, int64_t x_stride, int dtype, int bias_dtype) {
             return Int8LinearParams{nullptr,
                                     nullptr,
                                     nullptr,
                                     nullptr,
                                     nullptr,
                                     rows,
                                     outputs,
                                     depth,
                                     x_stride,
                                     outputs,
                                     static_cast<DType>(dtype),
                                     static_cast<DType>(bias_dtype),
                                     1,
                                     nullptr};
           }),
           py::arg("rows"), py::arg("outputs"), py::arg("depth"), py::arg("x_stride"), py::arg("dtype"),
           py::arg("bias_dtype"));
  // Tensors: x, the packed weight, weight_scale, bias or None, out.
  call::define_kernel<Int8LinearParams, 5, fill_int8_linear, run_int8_linear>(m, "int8_linear");
  m.def(
      "quantize_rows",
      [](uintptr_t x, uintptr_t quantized, uintptr_t scale, uintptr_t zero, int64_t rows, int64_t depth,
         int64_t x_stride, int dtype) {
        quantize_rows({reinterpret_cast<const void*>(x), reinterpret_cast<uint8_t*>(quantized),
                       reinterpret_cast<float*>(scale), reinterpret_cast<int32_t*>(zero), rows, depth, x_stride,
                       static_cast<DType>(dtype)});
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace llmkern
