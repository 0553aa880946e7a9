// The int8 kernels as Python functions; included by register.cpp alone.
#pragma once
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "../common/dispatch.h"
#include "params.h"

namespace llmkern {

LLMKERN_KERNEL(int8_pack, Int8PackParams)
LLMKERN_KERNEL(int8_linear, Int8LinearParams)
LLMKERN_KERNEL(quantize_rows, QuantizeRowsParams)

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
  m.def(
      "int8_linear",
      [](uintptr_t x, uintptr_t packed, uintptr_t weight_scale, uintptr_t bias, uintptr_t out, int64_t rows,
         int64_t outputs, int64_t depth, int64_t x_stride, int dtype, int bias_dtype, int threads) {
        bool accepted = true;
        int8_linear({reinterpret_cast<const void*>(x), reinterpret_cast<const void*>(packed),
                     reinterpret_cast<const float*>(weight_scale), reinterpret_cast<const void*>(bias),
                     reinterpret_cast<void*>(out), rows, outputs, depth, x_stride, outputs, static_cast<DType>(dtype),
                     static_cast<DType>(bias_dtype), threads, &accepted});
        if (!accepted) throw std::invalid_argument("int8_linear: packed: not from int8_pack of this instruction set");
      },
      py::call_guard<py::gil_scoped_release>());
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
