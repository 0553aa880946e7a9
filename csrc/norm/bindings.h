// The normalisation kernels as Python functions; included by register.cpp alone.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "../common/dispatch.h"
#include "params.h"

namespace llmkern {

LLMKERN_KERNEL(norm, NormParams)
LLMKERN_KERNEL(norm_backward, NormBackwardParams)

inline void bind_norm(pybind11::module_& m) {
  namespace py = pybind11;
  // addresses: x, residual, weight, bias, out, total, statistics; sizes: rows, width; strides: x, residual; dtypes:
  // elements, weights.
  m.def(
      "norm",
      [](const std::array<uintptr_t, 7>& addresses, const std::array<int64_t, 2>& sizes,
         const std::array<int64_t, 2>& strides, const std::array<int, 2>& dtypes, float eps, float offset, bool centred,
         int threads) {
        auto in = [&](int i) { return reinterpret_cast<const void*>(addresses[i]); };
        auto out = [&](int i) { return reinterpret_cast<void*>(addresses[i]); };
        norm({in(0), in(1), in(2), in(3), out(4), out(5), static_cast<float*>(out(6)), sizes[0], sizes[1], strides[0],
              strides[1], eps, offset, centred, static_cast<DType>(dtypes[0]), static_cast<DType>(dtypes[1]), threads});
      },
      py::call_guard<py::gil_scoped_release>());
  // addresses: grad, grad_total, total, weight, statistics, dx, weight_sums, bias_sums; sizes: rows, width, chunks,
  // rows of a chunk; strides: grad, grad_total, total; dtypes as above.
  m.def(
      "norm_backward",
      [](const std::array<uintptr_t, 8>& addresses, const std::array<int64_t, 4>& sizes,
         const std::array<int64_t, 3>& strides, const std::array<int, 2>& dtypes, float offset, bool centred,
         int threads) {
        auto in = [&](int i) { return reinterpret_cast<const void*>(addresses[i]); };
        auto sums = [&](int i) { return reinterpret_cast<float*>(addresses[i]); };
        norm_backward({in(0),
                       in(1),
                       in(2),
                       in(3),
                       static_cast<const float*>(in(4)),
                       reinterpret_cast<void*>(addresses[5]),
                       sums(6),
                       sums(7),
                       sizes[0],
                       sizes[1],
                       sizes[2],
                       sizes[3],
                       strides[0],
                       strides[1],
                       strides[2],
                       offset,
                       centred,
                       static_cast<DType>(dtypes[0]),
                       static_cast<DType>(dtypes[1]),
                       threads});
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace llmkern
