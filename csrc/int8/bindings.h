// The int8 kernels as Python functions; included by register.cpp alone.
#pragma once
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "../common/call.h"
#include "../common/dispatch.h"
#include "params.h"

namespace llmkern {

LLMKERN_BYTE_KERNEL(int8_pack, Int8PackParams)
LLMKERN_BYTE_KERNEL(int8_linear, Int8LinearParams)
LLMKERN_BYTE_KERNEL(quantize_rows, QuantizeRowsParams)

inline void fill_int8_linear(Int8LinearParams& p, void* const* addresses) {
  p.x = addresses[0], p.packed = addresses[1], p.weight_scale = static_cast<const float*>(addresses[2]);
  p.bias = addresses[3], p.residual = addresses[4], p.quantize.given = static_cast<const float*>(addresses[5]);
  p.out = addresses[6];
}

inline void run_int8_linear(const Int8LinearParams& plan) {
  Int8LinearParams p = plan;
  bool accepted = true;
  p.accepted = &accepted;
  int8_linear(p);
  if (!accepted) throw std::invalid_argument("int8_linear: packed: not from int8_pack of this layout");
}

inline void bind_int8(pybind11::module_& m) {
  namespace py = pybind11;
  m.def(
      "int8_packed_bytes",
      [](int64_t outputs, int64_t depth, int64_t group, bool pairs) {
        int64_t bytes = 0;
        int8_pack({nullptr, nullptr, outputs, depth, group, pairs, 1, &bytes});
        return bytes;
      },
      "How much memory int8_pack writes.");
  m.def(
      "int8_pack",
      [](uintptr_t weight, uintptr_t packed, int64_t outputs, int64_t depth, int64_t group, bool pairs, int threads) {
        int64_t bytes = 0;
        int8_pack({reinterpret_cast<const int8_t*>(weight), reinterpret_cast<void*>(packed), outputs, depth, group,
                   pairs, threads, &bytes});
      },
      py::call_guard<py::gil_scoped_release>());
  py::class_<QuantizeParams>(m, "Quantization")
      .def(py::init([](int scaling, bool outliers, int64_t group, int64_t rotate) {
             return QuantizeParams{static_cast<Scaling>(scaling), outliers, group, rotate, nullptr};
           }),
           py::arg("scaling"), py::arg("outliers"), py::arg("group"), py::arg("rotate"));
  py::class_<Int8LinearParams>(m, "Int8LinearPlan")
      .def(py::init([](int64_t rows, int64_t outputs, int64_t depth, int64_t x_stride, int64_t residual_stride,
                       int64_t out_stride, const QuantizeParams& quantization, int activation, int dtype,
                       int bias_dtype) {
             Int8LinearParams p{};
             p.rows = rows, p.outputs = outputs, p.depth = depth;
             p.x_stride = x_stride, p.residual_stride = residual_stride, p.out_stride = out_stride;
             p.quantize = quantization, p.activation = static_cast<Activation>(activation);
             p.dtype = static_cast<DType>(dtype), p.bias_dtype = static_cast<DType>(bias_dtype), p.threads = 1;
             return p;
           }),
           py::kw_only(), py::arg("rows"), py::arg("outputs"), py::arg("depth"), py::arg("x_stride"),
           py::arg("residual_stride"), py::arg("out_stride"), py::arg("quantization"), py::arg("activation"),
           py::arg("dtype"), py::arg("bias_dtype"))
      .def_readonly("rows", &Int8LinearParams::rows)
      .def_readonly("outputs", &Int8LinearParams::outputs)
      .def_readonly("depth", &Int8LinearParams::depth)
      .def_readonly("x_stride", &Int8LinearParams::x_stride)
      .def_readonly("residual_stride", &Int8LinearParams::residual_stride)
      .def_readonly("out_stride", &Int8LinearParams::out_stride)
      .def_property_readonly("group", [](const Int8LinearParams& p) { return p.quantize.group; })
      .def_property_readonly("pairs", [](const Int8LinearParams& p) { return takes_pairs(p.activation); })
      .def_property_readonly("dtype", [](const Int8LinearParams& p) { return static_cast<int>(p.dtype); })
      .def_property_readonly("bias_dtype", [](const Int8LinearParams& p) { return static_cast<int>(p.bias_dtype); });
  // Tensors: x, the packed weight, weight_scale, bias or None, residual or None, scale and zero or None, out.
  call::define_kernel<Int8LinearParams, 7, fill_int8_linear, run_int8_linear>(m, "int8_linear");
  m.def(
      "quantize_rows",
      [](uintptr_t x, uintptr_t integer, uintptr_t scale, uintptr_t zero, uintptr_t given, int64_t rows, int64_t depth,
         int64_t x_stride, QuantizeParams quantization, int dtype) {
        quantization.given = reinterpret_cast<const float*>(given);
        quantize_rows({reinterpret_cast<const void*>(x), reinterpret_cast<int32_t*>(integer),
                       reinterpret_cast<float*>(scale), reinterpret_cast<int32_t*>(zero), rows, depth, x_stride,
                       quantization, static_cast<DType>(dtype)});
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace llmkern
