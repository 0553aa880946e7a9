// The losses as Python functions; included by register.cpp alone.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "../common/dispatch.h"
#include "layout.h"
#include "params.h"

namespace llmkern {

LLMKERN_KERNEL(linear_cross_entropy, LinearCrossEntropyParams)

inline void bind_loss(pybind11::module_& m) {
  namespace py = pybind11;
  // addresses: hidden, weight, bias, their gradients, targets, upstream, loss, lse, work; sizes: rows, vocabulary,
  // width, chunk; strides: hidden, weight; rule: label smoothing, z-loss.
  m.def(
      "linear_cross_entropy",
      [](const std::array<uintptr_t, 11>& addresses, const std::array<int64_t, 4>& sizes,
         const std::array<int64_t, 2>& strides, int64_t ignore_index, const std::array<float, 2>& rule, bool backward,
         int dtype, int threads) {
        auto in = [&](int i) { return reinterpret_cast<const void*>(addresses[i]); };
        auto floats = [&](int i) { return reinterpret_cast<float*>(addresses[i]); };
        linear_cross_entropy({{in(0), in(1), in(2), sizes[2], strides[0], strides[1]},
                              {floats(3), floats(4), floats(5)},
                              static_cast<const int64_t*>(in(6)),
                              floats(7),
                              floats(8),
                              floats(9),
                              floats(10),
                              sizes[0],
                              sizes[1],
                              sizes[3],
                              {ignore_index, rule[0], rule[1]},
                              backward,
                              static_cast<DType>(dtype),
                              threads});
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "linear_cross_entropy_units",
      [](int64_t width, int64_t vocabulary, int64_t chunk, bool hidden, bool weight, bool any, bool backward) {
        return linear_cross_entropy_units(width, vocabulary, chunk, hidden, weight, any, backward);
      },
      "The floats of work that it needs.");
}

}  // namespace llmkern
