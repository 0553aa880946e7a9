// Tiles of kRows rows and one panel in vector registers, over the whole of k; finish.h reads the sums from the
// first-level cache.
#pragma once
#include <type_traits>

#include "finish.h"

namespace llmkern::LLMKERN_ISA {

constexpr int kRows = 6;      // 6 x kVectors sums, kVectors weights and an activation fill the registers
constexpr int kWideRows = 3;  // two sums for each

// The weights of vector j in a step that begins at `weight`, and a hint that those `ahead` bytes on will be wanted.
LLMKERN_INLINE Int weights_of(const Layout& layout, const int8_t* weight, int j) {
  return load_weights(weight + layout.at_vector(j));
}
LLMKERN_INLINE void prefetch_weights(const Layout& layout, const int8_t* weight, int ahead) {
  constexpr int kPerLine = 64 / (kWidth * kDotDepth) > 1 ? 64 / (kWidth * kDotDepth) : 1;
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; j += kPerLine) __builtin_prefetch(weight + layout.at_vector(j) + ahead);
}

// sums += digits * weights, over steps [begin, end) of a panel. x: at `begin`. kHigh: of high digits alone.
template <int Rows, bool kHigh, bool kPrefetch, class Digit>
LLMKERN_INLINE void multiply(Int (&sums)[Rows][kVectors], const Digit* x, int64_t stride, const Layout& layout,
                             const int8_t* panel, int64_t begin, int64_t end) {
  for (int64_t step = begin; step < end; step++, x += kDotDepth) {
    const int8_t* weight = panel + layout.at_step(step);
    Int vector[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; j++) {
      vector[j] = weights_of(layout, weight, j);
      if (kHigh) vector[j] = high_weights(vector[j]);
    }
    if (kPrefetch) prefetch_weights(layout, weight, 4096);
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

template <int Rows>
LLMKERN_INLINE void put_sums(const Int (&sums)[Rows][kVectors], int32_t* out) {
#pragma GCC unroll 8
  for (int i = 0; i < Rows; i++)
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; j++) std::memcpy(out + i * kPanel + j * kWidth, &sums[i][j], sizeof(Int));
}

// The quads of k, 64 of them, in which one of the rows has a high digit.
LLMKERN_INLINE uint64_t high_quads_of(const Work& w, int64_t row, int rows, int64_t word) {
  uint64_t quads = 0;
  for (int i = 0; i < rows; i++) quads |= w.bits[(row + i) * w.words + word];
  return quads;
}
LLMKERN_INLINE bool any_high(const Work& w, int64_t row, int rows) {
  if (!w.high) return false;
  uint64_t any = 0;
  for (int64_t word = 0; word < w.words; word++) any |= high_quads_of(w, row, rows, word);
  return any != 0;
}

// Functions of their own, not inlined, whose sums begin as zeros and end in memory: in any other form g++ 12 keeps a
// copy of them there in the loop too.
template <int Rows>
__attribute__((noinline)) void low_sums(const Work& w, int64_t row, int64_t panel, int32_t* out) {
  constexpr bool kPrefetch = Rows <= 4;  // where the weights' way from memory is the cost
  Int sums[Rows][kVectors];
  clear(sums);
  multiply<Rows, false, kPrefetch>(sums, w.low + row * w.stride, w.stride, *w.layout, w.panel(panel), 0,
                                   w.layout->steps);
  put_sums(sums, out);
}

// Of high digits, over the quads of k in which one of the rows has any: the digits of the others are 0 there, so that a
// row's sum does not depend on its neighbours.
template <int Rows>
__attribute__((noinline)) void high_sums(const Work& w, int64_t row, int64_t panel, int32_t* out) {
  Int sums[Rows][kVectors];
  clear(sums);
  const High* x = w.high + row * w.stride;
  for (int64_t word = 0; word < w.words; word++) {
    for (uint64_t quads = high_quads_of(w, row, Rows, word); quads; quads &= quads - 1) {
      int64_t quad = word * 64 + __builtin_ctzll(quads);
      multiply<Rows, true, false>(sums, x + quad * kQuad, w.stride, *w.layout, w.panel(panel), quad * kStepsOfQuad,
                                  (quad + 1) * kStepsOfQuad);
    }
  }
  put_sums(sums, out);
}

// Of both digits over all k, with each weight read once.
template <int Rows>
__attribute__((noinline)) void wide_sums(const Work& w, int64_t row, int64_t panel, int32_t* out, int32_t* high_out) {
  Int low[Rows][kVectors], high[Rows][kVectors];
  clear(low);
  clear(high);
  const Layout& layout = *w.layout;
  const Low* x = w.low + row * w.stride;
  const High* h = w.high + row * w.stride;
  for (int64_t step = 0; step < layout.steps; step++, x += kDotDepth, h += kDotDepth) {
    const int8_t* weight = w.panel(panel) + layout.at_step(step);
    prefetch_weights(layout, weight, 4096);
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; j++) {
      Int vector = weights_of(layout, weight, j), changed = high_weights(vector);
#pragma GCC unroll 8
      for (int i = 0; i < Rows; i++) {
        low[i][j] = dot(low[i][j], broadcast_step(x + i * w.stride), vector);
        high[i][j] = dot_high(high[i][j], broadcast_step(h + i * w.stride), changed);
      }
    }
  }
  put_sums(low, out);
  put_sums(high, high_out);
}

template <class T, int Rows>
void tile(const Work& w, int64_t row, int64_t panel) {
  alignas(64) int32_t low[Rows * kPanel], high[Rows * kPanel];
  low_sums<Rows>(w, row, panel, low);
  const bool two = any_high(w, row, Rows);
  if (two) high_sums<Rows>(w, row, panel, high);
  finish<T, kHighOffset>(w, row, Rows, columns_of(w, panel, 0, kVectors), low, two ? high : nullptr);
}

template <class T, int Rows>
void wide_tile(const Work& w, int64_t row, int64_t panel) {
  alignas(64) int32_t low[Rows * kPanel], high[Rows * kPanel];
  wide_sums<Rows>(w, row, panel, low, high);
  finish<T, kHighOffset>(w, row, Rows, columns_of(w, panel, 0, kVectors), low, high);
}

// Groups of k, each with scales of its own on both sides; the totals, which have no registers left, are in the cache.
template <int Rows>
__attribute__((noinline)) void group_sums(const Low* x, int64_t stride, const Layout& layout, const int8_t* panel,
                                          int64_t begin, int64_t end, int32_t* out) {
  Int sums[Rows][kVectors];
  clear(sums);
  multiply<Rows, false, Rows <= 4>(sums, x, stride, layout, panel, begin, end);
  put_sums(sums, out);
}

template <int Rows>
void group_totals(const Work& w, int64_t row, int64_t panel, float* totals) {
  const Layout& layout = *w.layout;
  const int64_t group_steps = layout.group / kDotDepth;
  const Low* x = w.low + row * w.stride;
  for (int i = 0; i < Rows * kPanel; i++) totals[i] = 0.0f;
  for (int64_t g = 0, first = 0; g < layout.groups; g++, first += group_steps) {
    const int64_t end = first + group_steps < layout.steps ? first + group_steps : layout.steps;
    alignas(64) int32_t sums[Rows * kPanel];
    group_sums<Rows>(x + first * kDotDepth, w.stride, layout, w.panel(panel), first, end, sums);
    add_group<kVectors>(w, row, Rows, columns_of_group(w, panel, 0, kVectors, g), sums, totals);
  }
}

template <class T, int Rows>
void grouped_tile(const Work& w, int64_t row, int64_t panel) {
  alignas(64) float totals[Rows * kPanel];
  group_totals<Rows>(w, row, panel, totals);
  finish_groups<T>(w, row, Rows, columns_of(w, panel, 0, kVectors), totals);
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

// How many of `left` rows the next tile takes: at most `most`, the last two of like size.
LLMKERN_INLINE int next_rows(int64_t left, int most) {
  return static_cast<int>(left >= 2 * most || left == most ? most : left > most ? (left + 1) / 2 : left);
}

// Calls each(row, constant of the count of rows) for the tiles of rows [begin, end).
template <int kMost, class Each>
LLMKERN_INLINE void each_tile(int64_t begin, int64_t end, const Each& each) {
  for (int64_t row = begin; row < end;) {
    const int rows = next_rows(end - row, kMost);
    if constexpr (kMost > kWideRows) {
      if (rows == 6) each(row, std::integral_constant<int, 6>{});
      if (rows == 5) each(row, std::integral_constant<int, 5>{});
      if (rows == 4) each(row, std::integral_constant<int, 4>{});
    }
    if (rows == 3) each(row, std::integral_constant<int, 3>{});
    if (rows == 2) each(row, std::integral_constant<int, 2>{});
    if (rows == 1) each(row, std::integral_constant<int, 1>{});
    row += rows;
  }
}

// Rows [begin, end) of a panel.
template <class T, Kind kKind>
void tiles(const Work& w, int64_t begin, int64_t end, int64_t panel) {
  each_tile<kKind == Kind::wide ? kWideRows : kRows>(
      begin, end, [&](int64_t row, auto rows) { one_tile<T, decltype(rows)::value, kKind>(w, row, panel); });
}

}  // namespace llmkern::LLMKERN_ISA
