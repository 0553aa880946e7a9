// Arguments of the positional kernels, the same for the CPU and CUDA. Strides count elements.
#pragma once
#include <cstdint>

#include "../common/types.h"

namespace llmkern {

// out[s, b, d] = (x[s, b, d] * scale + pe[s, d]) * factor: sequence first, the last dimension contiguous.
// pe may be null, for zeros (the backward). Without dropout (drop_below = 0) factor is 1. With it, factor is 0 where
// word d % 4 of Philox4x32-10 at counter (d / 4, row's low half, row's high half, 0), row = s * batch + b, with key
// (seed's low half, seed's high half), is less than drop_below, and keep_scale elsewhere.
struct SinusoidalAddParams {
  const void* x;
  const float* pe;
  void* out;
  int64_t length, batch, width;
  int64_t x_stride_s, x_stride_b, pe_stride_s, out_stride_s, out_stride_b;
  float scale;
  DType dtype;
  int threads;
  uint32_t drop_below = 0;
  float keep_scale = 1;
  uint64_t seed = 0;
};

// Rotates the first `rotated` of the `width` elements of each row of q (batch, heads, length, width) and k (batch,
// kv_heads, length, width) by the angles of its position, and copies the others:
//   a' = a cos - b sin, b' = b cos + a sin, with pair j = (row[j], row[j + rotated / 2]),
//   or (row[2 j], row[2 j + 1]) where interleaved; `inverse` takes -sin.
// k may be null. The output may be the input itself (same address and strides). The last dimension is contiguous
// everywhere; strides are of (batch, head, position). The tables are (table_length, rotated / 2), their last dimension
// contiguous; their row for (b, s) is positions[b, s], or s where positions is null. A position outside [0,
// table_length) reads nothing: the row's rotated elements become NaN.
struct RotaryParams {
  const void *q, *k;
  void *q_out, *k_out;
  const void *cos, *sin;
  const void* positions;
  int64_t batch, heads, kv_heads, length, width, rotated, table_length;
  int64_t q_stride[3], k_stride[3], q_out_stride[3], k_out_stride[3];
  int64_t cos_stride, sin_stride;
  int64_t position_stride_b, position_stride_s;
  DType dtype, table_dtype, position_dtype;  // f32, bf16, f16; f32 or dtype; i32 or i64
  bool interleaved, inverse;
  int threads;
};

}  // namespace llmkern
