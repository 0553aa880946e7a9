// The gated activations as Python functions; included by register.cpp alone.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "../common/dispatch.h"
#include "params.h"

namespace llmkern {

LLMKERN_KERNEL(gated, GatedParams)
LLMKERN_KERNEL(gated_backward, GatedBackwardParams)

inline void bind_activation(pybind11::module_& m) {
  namespace py = pybind11;
  // sizes: rows, width; strides: gate, up.
  m.def(
      "gated",
      [](uintptr_t gate, uintptr_t up, uintptr_t out, const std::array<int64_t, 2>& sizes,
         const std::array<int64_t, 2>& strides, int function, int dtype, int threads) {
        gated({reinterpret_cast<const void*>(gate), reinterpret_cast<const void*>(up), reinterpret_cast<void*>(out),
               sizes[0], sizes[1], strides[0], strides[1], static_cast<Gate>(function), static_cast<DType>(dtype),
               threads});
      },
      py::call_guard<py::gil_scoped_release>());
  // strides: grad, gate, up, dgate, dup.
  m.def(
      "gated_backward",
      [](uintptr_t grad, uintptr_t gate, uintptr_t up, uintptr_t dgate, uintptr_t dup,
         const std::array<int64_t, 2>& sizes, const std::array<int64_t, 5>& strides, int function, int dtype,
         int threads) {
        gated_backward({reinterpret_cast<const void*>(grad), reinterpret_cast<const void*>(gate),
                        reinterpret_cast<const void*>(up), reinterpret_cast<void*>(dgate), reinterpret_cast<void*>(dup),
                        sizes[0], sizes[1], strides[0], strides[1], strides[2], strides[3], strides[4],
                        static_cast<Gate>(function), static_cast<DType>(dtype), threads});
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace llmkern
