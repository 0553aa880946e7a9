// Rotation of the elements of a row in pairs, by the angles of its position: what rotary and the attention on a cache
// share. Pair j is (row[j], row[j + rotated / 2]), or (row[2 j], row[2 j + 1]) where interleaved:
//   a' = a cos - b sin, b' = b cos + a sin.
#pragma once
#include <cstdint>

#include "types.h"

namespace llmkern {

// cos and sin, (length, rotated / 2), the last dimension contiguous.
struct RotationTables {
  const void *cos, *sin;
  DType dtype;
  int64_t length, rotated, cos_step, sin_step;
  bool interleaved, inverse;  // inverse: -sin
};

}  // namespace llmkern

#ifdef LLMKERN_ISA
#include "simd.h"

namespace llmkern::LLMKERN_ISA {
namespace {

// Row of the tables as floats: cos and sin, `rotated / 2` each; where interleaved, every cosine twice and every sine as
// (-sin, sin), `rotated` each, so that row * cos + swap_pairs(row) * sin is the rotation. NaN outside of the tables.
template <class C>
void widen_tables(const RotationTables& t, int64_t row, float* cos, float* sin) {
  int64_t half = t.rotated / 2;
  if (row < 0 || row >= t.length) {
    for (int64_t j = 0; j < (t.interleaved ? t.rotated : half); j++) cos[j] = sin[j] = __builtin_nanf("");
    return;
  }
  const C* c = static_cast<const C*>(t.cos) + row * t.cos_step;
  const C* s = static_cast<const C*>(t.sin) + row * t.sin_step;
  Float sign = broadcast(t.inverse ? -1.0f : 1.0f);
  alignas(64) float cos_part[kWidth], sin_part[kWidth];
  for (int64_t j = 0; j < half; j += kWidth) {
    int n = half - j < kWidth ? static_cast<int>(half - j) : kWidth;
    Float cosines = load_first(c + j, n), sines = mul(load_first(s + j, n), sign);
    if (!t.interleaved) {
      store_first(cos + j, cosines, n);
      store_first(sin + j, sines, n);
      continue;
    }
    store(cos_part, cosines);
    store(sin_part, sines);
    for (int i = 0; i < n; i++) {
      cos[2 * (j + i)] = cos[2 * (j + i) + 1] = cos_part[i];
      sin[2 * (j + i)] = -sin_part[i];
      sin[2 * (j + i) + 1] = sin_part[i];
    }
  }
}

// The tables are float32 or of the rows' dtype T.
template <class T>
void widen_angles(const RotationTables& t, int64_t row, float* cos, float* sin) {
  if (t.dtype == DType::f32)
    widen_tables<float>(t, row, cos, sin);
  else
    widen_tables<T>(t, row, cos, sin);
}

template <class T>
LLMKERN_INLINE void rotate_halves(const T* x, T* out, const float* cos, const float* sin, int64_t half) {
  int64_t j = 0;
  for (; j + kWidth <= half; j += kWidth) {
    Float a = load(x + j), b = load(x + half + j), c = load(cos + j), s = load(sin + j);
    store(out + j, sub(mul(a, c), mul(b, s)));
    store(out + half + j, fma(a, s, mul(b, c)));
  }
  if (j == half) return;
  int n = static_cast<int>(half - j);
  Float a = load_first(x + j, n), b = load_first(x + half + j, n), c = load_first(cos + j, n);
  Float s = load_first(sin + j, n);
  store_first(out + j, sub(mul(a, c), mul(b, s)), n);
  store_first(out + half + j, fma(a, s, mul(b, c)), n);
}

template <class T>
LLMKERN_INLINE void rotate_pairs(const T* x, T* out, const float* cos, const float* sin, int64_t rotated) {
  int64_t j = 0;
  for (; j + kWidth <= rotated; j += kWidth) {
    Float a = load(x + j);
    store(out + j, fma(swap_pairs(a), load(sin + j), mul(a, load(cos + j))));
  }
  if (j == rotated) return;
  int n = static_cast<int>(rotated - j);
  Float a = load_first(x + j, n);
  store_first(out + j, fma(swap_pairs(a), load_first(sin + j, n), mul(a, load_first(cos + j, n))), n);
}

// A row of `width` elements, those past the rotated ones copied; `out` may be `x`. cos and sin as widen_angles gives.
template <class T>
LLMKERN_INLINE void rotate_row(const RotationTables& t, const T* x, T* out, const float* cos, const float* sin,
                               int64_t width) {
  if (t.interleaved)
    rotate_pairs(x, out, cos, sin, t.rotated);
  else
    rotate_halves(x, out, cos, sin, t.rotated / 2);
  if (out != x && t.rotated < width)
    std::memcpy(out + t.rotated, x + t.rotated, static_cast<size_t>(width - t.rotated) * sizeof(T));
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
#endif
