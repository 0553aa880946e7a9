// From exact sums to results on CUDA: zero points, scales, bias, then function, pair and residual (csrc/int8/finish.h).
#pragma once
#include "../common/device.cuh"
#include "cuda.h"

namespace llmkern::int8 {

LLMKERN_DEVICE float load_as_float(const void* x, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::bf16:
      return device::widen(static_cast<const Bf16*>(x)[i]);
    case DType::f16:
      return device::widen(static_cast<const Fp16*>(x)[i]);
    default:
      return static_cast<const float*>(x)[i];
  }
}

// What is the same for all rows of an output.
struct Column {
  float scale, bias;
  int32_t weight_sum;
};
LLMKERN_DEVICE Column column_of(const Int8CudaParams& p, int64_t output) {
  const Int8LinearParams& l = p.linear;
  const bool grouped = p.digits.kind == Digits::groups;
  return {grouped ? 1.0f : l.weight_scale[output * p.weight_scale_stride[0]],
          l.bias ? load_as_float(l.bias, l.bias_dtype, output) : 0.0f, grouped ? 0 : p.weight_sums[output]};
}

// The linear part from the sums of products of low and high digits. Each operation rounds by itself, as the reference's
// do; 256 times a sum is exact, so that there one rounding is the same.
LLMKERN_DEVICE float linear(const Column& c, float row_scale, int32_t zero, int32_t low, int32_t high) {
  const float sum = fmaf(256.0f, static_cast<float>(high), static_cast<float>(low - zero * c.weight_sum));
  return __fadd_rn(__fmul_rn(sum, __fmul_rn(row_scale, c.scale)), c.bias);
}

LLMKERN_DEVICE float gelu(float x) { return __fmul_rn(0.5f * x, 1.0f + erff(x * 0.707106781f)); }
LLMKERN_DEVICE float silu(float x) { return __fdiv_rn(x, 1.0f + expf(-x)); }

LLMKERN_DEVICE float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::relu:
      return x < 0.0f ? 0.0f : x;
    case Activation::gelu:
    case Activation::geglu:
      return gelu(x);
    case Activation::gelu_tanh:
      return 0.5f * x * (1.0f + tanhf(0.797884561f * fmaf(0.044715f, x * x * x, x)));
    case Activation::silu:
    case Activation::swiglu:
      return silu(x);
    default:
      return x;
  }
}

// A result before its residual, from its linear part, and of a pair from `second` too.
LLMKERN_DEVICE float activate_pair(const Int8LinearParams& l, bool pairs, float y, float second) {
  y = activate(l.activation, y);
  return pairs ? __fmul_rn(y, second) : y;
}
// Result n of row m.
LLMKERN_DEVICE float finish(const Int8LinearParams& l, bool pairs, int64_t m, int64_t n, float y, float second) {
  y = activate_pair(l, pairs, y, second);
  if (l.residual) y = __fadd_rn(y, load_as_float(l.residual, l.dtype, m * l.residual_stride + n));
  return y;
}

LLMKERN_DEVICE void put(const Int8LinearParams& l, int64_t m, int64_t n, float y) {
  const int64_t i = m * l.out_stride + n;
  switch (l.dtype) {
    case DType::bf16:
      static_cast<Bf16*>(l.out)[i] = device::narrow(y, Bf16{});
      break;
    case DType::f16:
      static_cast<Fp16*>(l.out)[i] = device::narrow(y, Fp16{});
      break;
    default:
      static_cast<float*>(l.out)[i] = y;
  }
}

// Results n and n + 1 of row m, where they lie together in a word of memory.
LLMKERN_DEVICE void put_two(const Int8LinearParams& l, int64_t m, int64_t n, float y0, float y1) {
  const int64_t i = m * l.out_stride + n;
  switch (l.dtype) {
    case DType::bf16:
      *reinterpret_cast<uint32_t*>(static_cast<Bf16*>(l.out) + i) = device::narrow_pair(y0, y1, Bf16{});
      break;
    case DType::f16:
      *reinterpret_cast<uint32_t*>(static_cast<Fp16*>(l.out) + i) = device::narrow_pair(y0, y1, Fp16{});
      break;
    default:
      *reinterpret_cast<float2*>(static_cast<float*>(l.out) + i) = make_float2(y0, y1);
  }
}

// Whether four neighbouring elements of a matrix in the inputs' dtype, from a multiple of 4 on, can be accessed at
// once.
LLMKERN_DEVICE bool four_together(const Int8LinearParams& l, const void* x, int64_t stride) {
  return stride % 4 == 0 && reinterpret_cast<uintptr_t>(x) % (l.dtype == DType::f32 ? 16 : 8) == 0;
}
// Residuals n to n + count - 1 of row m; wide: four_together.
LLMKERN_DEVICE void load_four(const Int8LinearParams& l, int64_t m, int64_t n, int count, bool wide, float (&x)[4]) {
  const int64_t i = m * l.residual_stride + n;
  if (!wide || count < 4) {
#pragma unroll
    for (int e = 0; e < 4; e++) x[e] = e < count ? load_as_float(l.residual, l.dtype, i + e) : 0.0f;
  } else if (l.dtype == DType::f32) {
    const float4 four = *reinterpret_cast<const float4*>(static_cast<const float*>(l.residual) + i);
    x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
  } else {
    const uint2 four = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(l.residual) + i);
    if (l.dtype == DType::bf16)
      device::widen_pair(four.x, x, Bf16{}), device::widen_pair(four.y, x + 2, Bf16{});
    else
      device::widen_pair(four.x, x, Fp16{}), device::widen_pair(four.y, x + 2, Fp16{});
  }
}
// Results n to n + count - 1 of row m; wide: four_together.
LLMKERN_DEVICE void put_four(const Int8LinearParams& l, int64_t m, int64_t n, int count, bool wide, const float* y) {
  const int64_t i = m * l.out_stride + n;
  if (!wide || count < 4) {
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (e < count) put(l, m, n + e, y[e]);
  } else if (l.dtype == DType::f32) {
    *reinterpret_cast<float4*>(static_cast<float*>(l.out) + i) = make_float4(y[0], y[1], y[2], y[3]);
  } else {
    const bool half = l.dtype == DType::f16;
    *reinterpret_cast<uint2*>(static_cast<uint16_t*>(l.out) + i) =
        make_uint2(half ? device::narrow_pair(y[0], y[1], Fp16{}) : device::narrow_pair(y[0], y[1], Bf16{}),
                   half ? device::narrow_pair(y[2], y[3], Fp16{}) : device::narrow_pair(y[2], y[3], Bf16{}));
  }
}

}  // namespace llmkern::int8
