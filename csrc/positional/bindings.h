// The positional kernels as Python functions; included by register.cpp alone.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>

#include "../common/dispatch.h"
#include "params.h"

namespace llmkern {

LLMKERN_KERNEL(sinusoidal_add, SinusoidalAddParams)
LLMKERN_KERNEL(rotary, RotaryParams)

// What calls with the same metadata share: sizes (B, H, Hkv, S, D, R, table length), strides (q, k, q_out, k_out: three
// each; cos, sin; positions: batch and position), dtypes (q, tables, positions).
inline RotaryParams rotary_plan(const std::array<int64_t, 7>& sizes, const std::array<int64_t, 16>& strides,
                                const std::array<int, 3>& dtypes, bool interleaved, bool inverse) {
  RotaryParams p = {};
  p.batch = sizes[0], p.heads = sizes[1], p.kv_heads = sizes[2], p.length = sizes[3], p.width = sizes[4];
  p.rotated = sizes[5], p.table_length = sizes[6];
  int64_t* targets[4] = {p.q_stride, p.k_stride, p.q_out_stride, p.k_out_stride};
  for (int i = 0; i < 12; i++) targets[i / 3][i % 3] = strides[i];
  p.cos_stride = strides[12], p.sin_stride = strides[13];
  p.position_stride_b = strides[14], p.position_stride_s = strides[15];
  p.dtype = static_cast<DType>(dtypes[0]), p.table_dtype = static_cast<DType>(dtypes[1]);
  p.position_dtype = static_cast<DType>(dtypes[2]);
  p.interleaved = interleaved, p.inverse = inverse;
  return p;
}

// The positions lie in host memory: they are looked at before anything is written.
template <class Int>
inline void check_positions(const RotaryParams& p) {
  for (int64_t b = 0; b < (p.position_stride_b ? p.batch : std::min<int64_t>(p.batch, 1)); b++)
    for (int64_t s = 0; s < p.length; s++) {
      int64_t x = static_cast<const Int*>(p.positions)[b * p.position_stride_b + s * p.position_stride_s];
      if (x < 0 || x >= p.table_length)
        throw std::invalid_argument("position_ids: expected values in [0, length) with length = " +
                                    std::to_string(p.table_length) + " of cos and sin, got " + std::to_string(x));
    }
}

inline void bind_positional(pybind11::module_& m) {
  namespace py = pybind11;
  m.def(
      "sinusoidal_add",
      [](uintptr_t x, uintptr_t pe, uintptr_t out, int64_t length, int64_t batch, int64_t width, int64_t x_stride_s,
         int64_t x_stride_b, int64_t pe_stride_s, int64_t out_stride_s, int64_t out_stride_b, float scale, int dtype,
         int threads, uint32_t drop_below, float keep_scale, int64_t seed) {
        sinusoidal_add({reinterpret_cast<const void*>(x), reinterpret_cast<const float*>(pe),
                        reinterpret_cast<void*>(out), length, batch, width, x_stride_s, x_stride_b, pe_stride_s,
                        out_stride_s, out_stride_b, scale, static_cast<DType>(dtype), threads, drop_below, keep_scale,
                        static_cast<uint64_t>(seed)});
      },
      py::arg("x"), py::arg("pe"), py::arg("out"), py::arg("length"), py::arg("batch"), py::arg("width"),
      py::arg("x_stride_s"), py::arg("x_stride_b"), py::arg("pe_stride_s"), py::arg("out_stride_s"),
      py::arg("out_stride_b"), py::arg("scale"), py::arg("dtype"), py::arg("threads"), py::arg("drop_below") = 0,
      py::arg("keep_scale") = 1.0f, py::arg("seed") = 0, py::call_guard<py::gil_scoped_release>());
  py::class_<RotaryParams>(m, "RotaryPlan").def(py::init(&rotary_plan));
  m.def(
      "rotary",
      [](const RotaryParams& plan, uintptr_t q, uintptr_t k, uintptr_t q_out, uintptr_t k_out, uintptr_t cos,
         uintptr_t sin, uintptr_t positions, int threads) {
        RotaryParams p = plan;
        p.q = reinterpret_cast<const void*>(q), p.k = reinterpret_cast<const void*>(k);
        p.q_out = reinterpret_cast<void*>(q_out), p.k_out = reinterpret_cast<void*>(k_out);
        p.cos = reinterpret_cast<const void*>(cos), p.sin = reinterpret_cast<const void*>(sin);
        p.positions = reinterpret_cast<const void*>(positions), p.threads = threads;
        if (p.positions && p.position_dtype == DType::i32) check_positions<int32_t>(p);
        if (p.positions && p.position_dtype == DType::i64) check_positions<int64_t>(p);
        rotary(p);
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace llmkern
