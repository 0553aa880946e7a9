// Going along a row: whole vectors, then the first elements of one, with the same arithmetic.
#pragma once
#include "simd.h"

namespace llmkern::LLMKERN_ISA {

// The sum of f(column, count) over the vectors of a row, in four chains, so that additions need not wait for each
// other. f must give 0 in the lanes from `count` on.
template <class F>
LLMKERN_INLINE float sum_over(int64_t width, F f) {
  Float sums[4] = {zero(), zero(), zero(), zero()};
  int64_t d = 0;
  for (; d + 4 * kWidth <= width; d += 4 * kWidth)
    for (int i = 0; i < 4; i++) sums[i] = add(sums[i], f(d + i * kWidth, kWidth));
  for (int i = 0; d < width; i++, d += kWidth) {
    const int64_t left = width - d;
    sums[i] = add(sums[i], f(d, left < kWidth ? static_cast<int>(left) : kWidth));
  }
  return sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

template <class T>
LLMKERN_INLINE Float load_some(const T* p, int n) {
  return n == kWidth ? load(p) : load_first(p, n);
}
template <class T>
LLMKERN_INLINE void store_some(T* p, Float a, int n) {
  if (n == kWidth)
    store(p, a);
  else
    store_first(p, a, n);
}

// Calls f(column, count) for the vectors of a row.
template <class F>
LLMKERN_INLINE void for_each_vector(int64_t width, F f) {
  int64_t d = 0;
  for (; d + kWidth <= width; d += kWidth) f(d, kWidth);
  if (d < width) f(d, static_cast<int>(width - d));
}

}  // namespace llmkern::LLMKERN_ISA
