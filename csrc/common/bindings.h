// The microbenchmarks of csrc/common as Python functions; included by register.cpp alone.
#pragma once
#include <pybind11/pybind11.h>

#include <vector>

#include "dispatch.h"
#include "roofline.h"

namespace llmkern {

LLMKERN_BYTE_KERNEL(roofline, RooflineParams)

inline void bind_common(pybind11::module_& m) {
  namespace py = pybind11;
  m.def(
      "roofline",
      [](int kind, uintptr_t data, int64_t bytes, int64_t repeats, int threads) {
        std::vector<float> sink(static_cast<size_t>(threads > 0 ? threads : 1));
        double work = 0.0;
        roofline({static_cast<Roofline>(kind), reinterpret_cast<const float*>(data), bytes, repeats, sink.data(), &work,
                  threads});
        return work;
      },
      py::call_guard<py::gil_scoped_release>(),
      "Operations done, or bytes read, by a microbenchmark of llmkern/evaluation/roofline.py.");
}

}  // namespace llmkern
