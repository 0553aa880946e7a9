// Tiles of kRows rows and one panel in vector registers: over the whole of k, then finished before they leave them.
#pragma once
#include "finish.h"

namespace llmkern::LLMKERN_ISA {

constexpr int kRows = 6;  // 6 x kVectors sums, kVectors weights and an activation fill the registers
constexpr int kWideRows = 3;  // two sums for each

// sums += digits * weights, over `steps` steps. kHigh: of high digits alone.
template <int Rows, bool kHigh, bool kPrefetch, class Digit>
LLMKERN_INLINE void multiply(Int (&sums)[Rows][kVectors], const Digit* x, int64_t stride, const int8_t* weight,
                             int64_t steps) {
  for (int64_t step = 0; step < steps; step++, weight += kPanel * kDotDepth, x += kDotDepth) {
    Int vector[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; j++) {
      vector[j] = load_weights(weight + j * kWidth * kDotDepth);
      if (kHigh) vector[j] = high_weights(vector[j]);
    }
    if (kPrefetch) {
#pragma GCC unroll 8
      for (int b = 0; b < kPanel * kDotDepth; b += 64) __builtin_prefetch(weight + 4096 + b);
    }
#pragma GCC unroll 8
    for (int i = 0; i < Rows; i++) {
      Int activation = broadcast_step(x + i * stride);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; j++)
        sums[i][j] = kHigh ? dot_high(sums[i][j], activation, vector[j]) : dot(sums[i][j], activation, vector[j]);
    }
  }
}

template <int Rows>
LLMKERN_INLINE void clear(Int (&sums)[Rows][kVectors]) {
#pragma GCC unroll 8
  for (int i = 0; i < Rows; i++)
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; j++) sums[i][j] = broadcast_int(0);
}

LLMKERN_INLINE Int weight_sum(const Work& w, int64_t panel, int j) {
  Int total;
  std::memcpy(&total, w.weight_sums + panel * w.layout->groups * kPanel + j * kWidth, sizeof total);
  return total;
}

// The sum of low digits without what the zero adds, and of high digits without what dot_high does, times 256.
LLMKERN_INLINE Float low_sum(const Work& w, int64_t row, Int sum, Int weight_sum) {
  return to_float(sub(sum, mul(weight_sum, broadcast_int(w.zeros[row]))));
}
LLMKERN_INLINE Float with_high(const Work& w, int64_t row, Int sum, Float low) {
  Int offset = broadcast_int(kHighOffset * w.high_sums[row]);
  return fma(to_float(sub(sum, offset)), broadcast(256.0f), low);
}

// Whether one of the rows has a high digit.
LLMKERN_INLINE bool any_high(const Work& w, int64_t row, int rows) {
  if (!w.high) return false;
  const uint64_t* bits = w.bits + row * w.words;
  uint64_t any = 0;
  for (int64_t i = 0; i < rows * w.words; i++) any |= bits[i];
  return any != 0;
}

// The sums of high digits of a tile, over the quads of k in which one of its rows has any: the digits of the others are
// 0 there, so that a row's sum does not depend on its neighbours.
template <int Rows>
__attribute__((noinline)) void high_sums(const Work& w, int64_t row, int64_t panel, int32_t* out) {
  Int sums[Rows][kVectors];
  clear(sums);
  const int8_t* weight = w.weights + panel * w.layout->panel_bytes;
  const High* x = w.high + row * w.stride;
  for (int64_t word = 0; word < w.words; word++) {
    uint64_t quads = 0;
    for (int i = 0; i < Rows; i++) quads |= w.bits[(row + i) * w.words + word];
    for (; quads; quads &= quads - 1) {
      int64_t quad = word * 64 + __builtin_ctzll(quads);
      multiply<Rows, true, false>(sums, x + quad * kQuad, w.stride, weight + quad * kQuad * kPanel, kStepsOfQuad);
    }
  }
  std::memcpy(out, sums, sizeof sums);
}

template <class T, int Rows>
void tile(const Work& w, int64_t row, int64_t panel) {
  constexpr bool kPrefetch = Rows <= 4;  // where the weights' way from memory is the cost
  Int sums[Rows][kVectors];
  clear(sums);
  multiply<Rows, false, kPrefetch>(sums, w.low + row * w.stride, w.stride,
                                   w.weights + panel * w.layout->panel_bytes, w.layout->steps);
  auto low = [&](int i, int j) { return low_sum(w, row + i, sums[i][j], weight_sum(w, panel, j)); };
  if (!any_high(w, row, Rows)) return finish<T, Rows>(w, row, panel, low);
  alignas(64) int32_t high[Rows][kVectors][kWidth];
  high_sums<Rows>(w, row, panel, &high[0][0][0]);
  finish<T, Rows>(w, row, panel, [&](int i, int j) {
    Int sum;
    std::memcpy(&sum, high[i][j], sizeof sum);
    return with_high(w, row + i, sum, low(i, j));
  });
}

// Both digits of all k, with each weight read once.
template <class T, int Rows>
void wide_tile(const Work& w, int64_t row, int64_t panel) {
  Int low[Rows][kVectors], high[Rows][kVectors];
  clear(low);
  clear(high);
  const int8_t* weight = w.weights + panel * w.layout->panel_bytes;
  for (int64_t step = 0; step < w.layout->steps; step++, weight += kPanel * kDotDepth) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; j++) {
      Int vector = load_weights(weight + j * kWidth * kDotDepth), changed = high_weights(vector);
      if (kWidth * kDotDepth == 64 || j == 0) __builtin_prefetch(weight + 4096 + j * 64);
#pragma GCC unroll 8
      for (int i = 0; i < Rows; i++) {
        const int64_t at = (row + i) * w.stride + step * kDotDepth;
        low[i][j] = dot(low[i][j], broadcast_step(w.low + at), vector);
        high[i][j] = dot_high(high[i][j], broadcast_step(w.high + at), changed);
      }
    }
  }
  finish<T, Rows>(w, row, panel, [&](int i, int j) {
    return with_high(w, row + i, high[i][j], low_sum(w, row + i, low[i][j], weight_sum(w, panel, j)));
  });
}

// Groups of k, each with scales of its own on both sides; the totals, which have no registers left, are in the cache.
template <class T, int Rows>
void grouped_tile(const Work& w, int64_t row, int64_t panel) {
  const Layout& layout = *w.layout;
  alignas(64) float totals[Rows][kPanel] = {};
  const int8_t* weight = w.weights + panel * layout.panel_bytes;
  const int32_t* weight_sums = w.weight_sums + panel * layout.groups * kPanel;
  Int zero_point = broadcast_int(128 - kLowOffset);
  for (int64_t g = 0; g < layout.groups; g++) {
    int64_t first = g * layout.group / kDotDepth;
    int64_t steps = layout.group / kDotDepth < layout.steps - first ? layout.group / kDotDepth : layout.steps - first;
    Int sums[Rows][kVectors];
    Float scale[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; j++) {
      Int total;
      std::memcpy(&total, weight_sums + g * kPanel + j * kWidth, sizeof total);
      total = sub(broadcast_int(0), mul(total, zero_point));
#pragma GCC unroll 8
      for (int i = 0; i < Rows; i++) sums[i][j] = total;
    }
    multiply<Rows, false, Rows <= 4>(sums, w.low + row * w.stride + first * kDotDepth, w.stride,
                                     weight + first * kPanel * kDotDepth, steps);
    const float* weight_scale = w.weight_scale + g * layout.outputs;
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; j++) {
      int n = static_cast<int>(layout.outputs_in(panel, j));
      const float* at = weight_scale + layout.first_output(panel, j);
      scale[j] = n == kWidth ? load(at) : n ? load_first(at, n) : zero();
    }
#pragma GCC unroll 8
    for (int i = 0; i < Rows; i++) {
      Float factor = broadcast(w.scales[(row + i) * layout.groups + g]);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; j++) {
        float* total = totals[i] + j * kWidth;
        store(total, fma(to_float(sums[i][j]), mul(factor, scale[j]), load(total)));
      }
    }
  }
  finish<T, Rows>(w, row, panel, [&](int i, int j) { return load(totals[i] + j * kWidth); });
}

enum class Kind { plain, wide, grouped };
template <class T, int Rows, Kind kKind>
LLMKERN_INLINE void one_tile(const Work& w, int64_t row, int64_t panel) {
  if constexpr (kKind == Kind::wide)
    wide_tile<T, Rows>(w, row, panel);
  else if constexpr (kKind == Kind::grouped)
    grouped_tile<T, Rows>(w, row, panel);
  else
    tile<T, Rows>(w, row, panel);
}

// Rows [begin, end) of a panel, in tiles of at most kRows (kWideRows) rows, the last two of like size.
template <class T, Kind kKind>
void tiles(const Work& w, int64_t begin, int64_t end, int64_t panel) {
  constexpr int kMost = kKind == Kind::wide ? kWideRows : kRows;
  for (int64_t row = begin; row < end;) {
    int64_t left = end - row, rows = left >= 2 * kMost || left == kMost ? kMost : left > kMost ? (left + 1) / 2 : left;
    if constexpr (kMost > kWideRows) {
      if (rows == 6) one_tile<T, 6, kKind>(w, row, panel);
      if (rows == 5) one_tile<T, 5, kKind>(w, row, panel);
      if (rows == 4) one_tile<T, 4, kKind>(w, row, panel);
    }
    if (rows == 3) one_tile<T, 3, kKind>(w, row, panel);
    if (rows == 2) one_tile<T, 2, kKind>(w, row, panel);
    if (rows == 1) one_tile<T, 1, kKind>(w, row, panel);
    row += rows;
  }
}

}  // namespace llmkern::LLMKERN_ISA
