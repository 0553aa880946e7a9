// The products of the linear losses: six rows of sums times four vectors in registers, of which one operand is
// broadcast and the other loaded, with memory asked for ahead between the multiply-adds.
#pragma once
#include "../common/tile.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int kLine = 64;  // bytes

// The compiler must not write a sum over an operand at its last use, and move registers around for it.
LLMKERN_INLINE void used(const Float& x) {
#if (defined(LLMKERN_SIMD_AVX512) || defined(__AVX2__)) && !defined(LLMKERN_EMULATE_AVX512)
  asm volatile("" : : "v"(x));
#else
  (void)x;
#endif
}

// Memory that is wanted soon, asked for line by line while something is multiplied, so that its way takes no time of
// its own: rows of matrices, one matrix after the other.
struct Ahead {
  struct Rows {
    const char* from;
    int64_t bytes, step, count;  // of a row, from row to row, of rows
  };
  Rows pieces[3] = {};
  int count = 0, piece = 0, lines = 0;  // lines: asked for with every eight k of a tile
  const char *at = nullptr, *row_end = nullptr;

  void add(const float* from, int64_t width, int64_t step, int64_t rows) {
    if (!width || !rows) return;
    pieces[count++] = {reinterpret_cast<const char*>(from), 4 * width, 4 * step, rows};
    if (count == 1) begin_row();
  }
  // To be spread over so many times eight k.
  void spread(int64_t steps) {
    int64_t all = 0;
    for (int i = 0; i < count; i++) all += (pieces[i].bytes + kLine - 1) / kLine * pieces[i].count;
    lines = steps ? static_cast<int>(at_most((all + steps - 1) / steps, kMostLines)) : 0;
  }
  // Past the end of a row by less than `lines`, so that a tile has one branch for them.
  __attribute__((always_inline)) void ask() {
    if (piece >= count) return;
    for (int l = 0; l < lines; l++) __builtin_prefetch(at + l * kLine, 0, 2);
    at += lines * kLine;
    if (__builtin_expect(at >= row_end, 0)) next_row();
  }

 private:
  static constexpr int64_t kMostLines = 4;  // more would keep the tile's own lines waiting
  void begin_row() { at = pieces[piece].from, row_end = at + pieces[piece].bytes; }
  __attribute__((noinline)) void next_row() {
    Rows& rows = pieces[piece];
    rows.from += rows.step;
    if (--rows.count == 0) piece++;
    if (piece < count) begin_row();
  }
};

// c = (c +) sum over k < depth of a(i, k) * b[k * ldb + j] for R rows i and V vectors of j. a(i, k) lies at
// a[i * a_step + k] where kAlong, else at a[i + k * a_step]. `tail`: the elements of the last vector of c.
template <bool kAlong, int R, int V>
inline void product_tile(const float* a, int64_t a_step, const float* b, int64_t ldb, int64_t depth, float* c,
                         int64_t ldc, bool add_to, int tail, Ahead& ahead) {
  Float sums[R][V];
#pragma GCC unroll 8
  for (int i = 0; i < R; i++)
#pragma GCC unroll 8
    for (int j = 0; j < V; j++) sums[i][j] = zero();
  auto one = [&](const float* x, const float* y) {
    Float row[V];
#pragma GCC unroll 8
    for (int j = 0; j < V; j++) row[j] = load(y + j * kWidth);
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
      Float factor = broadcast(kAlong ? x[i * a_step] : x[i]);
#pragma GCC unroll 8
      for (int j = 0; j < V; j++) sums[i][j] = fma(factor, row[j], sums[i][j]);
      used(factor);
    }
#pragma GCC unroll 8
    for (int j = 0; j < V; j++) used(row[j]);
  };
  const int64_t k_step = kAlong ? 1 : a_step;
  int64_t k = 0;
  for (; k + 8 <= depth; k += 8) {
#pragma GCC unroll 8
    for (int u = 0; u < 8; u++) one(a + u * k_step, b + u * ldb);
    ahead.ask();
    a += 8 * k_step, b += 8 * ldb;
  }
  for (; k < depth; k++, a += k_step, b += ldb) one(a, b);
#pragma GCC unroll 8
  for (int i = 0; i < R; i++)
#pragma GCC unroll 8
    for (int j = 0; j < V; j++) {
      float* to = c + i * ldc + j * kWidth;
      if (j == V - 1 && tail < kWidth) {
        if (add_to) sums[i][j] = add(sums[i][j], load_first(to, tail));
        store_first(to, sums[i][j], tail);
      } else {
        store(to, add_to ? add(load(to), sums[i][j]) : sums[i][j]);
      }
    }
}

// The operands of a product of m rows and n columns: b's panels of kPanel columns lie b_panel apart.
struct Operands {
  const float* a;
  int64_t a_step;
  const float* b;
  int64_t ldb, b_panel;
  float* c;
  int64_t ldc;
  bool add_to;
};

template <bool kAlong, int V = kVectors>
inline void product_panel(const Operands& o, int64_t m, int64_t depth, int vectors, int tail, Ahead& ahead) {
  if constexpr (V > 1) {
    if (vectors < V) return product_panel<kAlong, V - 1>(o, m, depth, vectors, tail, ahead);
  }
  const int64_t row = kAlong ? o.a_step : 1;
  int64_t i = 0;
  auto tile = [&](auto r) {
    constexpr int R = decltype(r)::value;
    product_tile<kAlong, R, V>(o.a + i * row, o.a_step, o.b, o.ldb, depth, o.c + i * o.ldc, o.ldc, o.add_to, tail,
                               ahead);
    i += R;
  };
  while (i + kTileRows <= m) tile(Number<kTileRows>{});
  if (i + 4 <= m) tile(Number<4>{});
  if (i + 2 <= m) tile(Number<2>{});
  if (i < m) tile(Number<1>{});
}

// c = (c +) a b.
template <bool kAlong>
void product(Operands o, int64_t m, int64_t n, int64_t depth, Ahead& ahead) {
  for (int64_t j = 0; j < n; j += kPanel) {
    const int64_t left = n - j < kPanel ? n - j : kPanel;
    const int vectors = static_cast<int>((left + kWidth - 1) / kWidth);
    product_panel<kAlong>(o, m, depth, vectors, static_cast<int>(left) - (vectors - 1) * kWidth, ahead);
    o.b += o.b_panel, o.c += kPanel;
  }
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
