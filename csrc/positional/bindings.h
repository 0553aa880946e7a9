// The positional kernels as Python functions; included by register.cpp alone.
#pragma once
#include <pybind11/pybind11.h>

#include "../common/dispatch.h"
#include "params.h"

namespace llmkern {

LLMKERN_KERNEL(sinusoidal_add, SinusoidalAddParams)

inline void bind_positional(pybind11::module_& m) {
  namespace py = pybind11;
  m.def(
      "sinusoidal_add",
      [](uintptr_t x, uintptr_t pe, uintptr_t out, int64_t length, int64_t batch, int64_t width, int64_t x_stride_s,
         int64_t x_stride_b, int64_t pe_stride_s, int64_t out_stride_s, int64_t out_stride_b, float scale, int dtype,
         int threads) {
        sinusoidal_add({reinterpret_cast<const void*>(x), reinterpret_cast<const float*>(pe),
                        reinterpret_cast<void*>(out), length, batch, width, x_stride_s, x_stride_b, pe_stride_s,
                        out_stride_s, out_stride_b, scale, static_cast<DType>(dtype), threads});
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace llmkern
