// The positional CUDA kernels as Python functions; included where the library has a CUDA part. `stream` is the address
// of a cudaStream_t, 0 for the default one.
#pragma once
#include <pybind11/pybind11.h>

#include "cuda.h"

namespace llmkern {

inline void bind_positional_cuda(pybind11::module_& m) {
  namespace py = pybind11;
  m.def(
      "sinusoidal_add_cuda",
      [](uintptr_t x, uintptr_t pe, uintptr_t out, int64_t length, int64_t batch, int64_t width, int64_t x_stride_s,
         int64_t x_stride_b, int64_t pe_stride_s, int64_t out_stride_s, int64_t out_stride_b, float scale, int dtype,
         int device, uintptr_t stream, uint32_t drop_below, float keep_scale, int64_t seed) {
        sinusoidal_add_cuda(
            {reinterpret_cast<const void*>(x), reinterpret_cast<const float*>(pe), reinterpret_cast<void*>(out), length,
             batch, width, x_stride_s, x_stride_b, pe_stride_s, out_stride_s, out_stride_b, scale,
             static_cast<DType>(dtype), 0, drop_below, keep_scale, static_cast<uint64_t>(seed)},
            device, reinterpret_cast<void*>(stream));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "rotary_cuda",
      [](const RotaryParams& plan, uintptr_t q, uintptr_t k, uintptr_t q_out, uintptr_t k_out, uintptr_t cos,
         uintptr_t sin, uintptr_t positions, int device, uintptr_t stream) {
        RotaryParams p = plan;
        p.q = reinterpret_cast<const void*>(q), p.k = reinterpret_cast<const void*>(k);
        p.q_out = reinterpret_cast<void*>(q_out), p.k_out = reinterpret_cast<void*>(k_out);
        p.cos = reinterpret_cast<const void*>(cos), p.sin = reinterpret_cast<const void*>(sin);
        p.positions = reinterpret_cast<const void*>(positions);
        rotary_cuda(p, device, reinterpret_cast<void*>(stream));
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace llmkern
