// Results of the int8 tiles for Hopper: from sums in wgmma's layout to rows in memory.
//
// A warp has 16 rows of the tile. It writes its sums into shared memory, and reads them back four columns to a thread,
// so that what follows is in one loop, and results and residuals are accessed by whole sectors.
#pragma once
#include "sm90_tile.cuh"

namespace llmkern::int8 {
namespace {

// Element i of a thread's sums lies in row thread % 32 / 4 + 8 (i / 2 % 2) of its warp's.
template <class T, class X>
LLMKERN_DEVICE void store_cells(const X (&sums)[T::kSums], X* cells, int lane) {
#pragma unroll
  for (int i = 0; i < T::kSums; i += 2) {
    const int at = (lane / 4 + 8 * (i / 2 % 2)) * T::kPitch + i / 4 * 8 + lane % 4 * 2;
    struct alignas(8) Pair {
      X x[2];
    };
    *reinterpret_cast<Pair*>(cells + at) = {{sums[i], sums[i + 1]}};
  }
}

template <class X>
LLMKERN_DEVICE void load_cells(const X* cells, X (&x)[4]) {
  struct alignas(16) Four {
    X x[4];
  };
  const Four four = *reinterpret_cast<const Four*>(cells);
#pragma unroll
  for (int e = 0; e < 4; e++) x[e] = four.x[e];
}

// cells: of this warp, with what store_cells wrote: low sums, then high ones; or totals. row: of the matrix, its first.
template <class T>
LLMKERN_DEVICE void finish_rows(const Int8CudaParams& p, const Block& block, const int32_t* cells, int row, int lane) {
  const Int8LinearParams& l = p.linear;
  const int chunks = (p.pairs ? T::kHalf : T::kColumns) / 4, across = min(chunks, 32);
  const int rows = min(kWarpRows, static_cast<int>(l.rows) - row);
  const bool out_wide = four_together(l, l.out, l.out_stride);
  const bool residual_wide = l.residual && four_together(l, l.residual, l.residual_stride);
#pragma unroll 1
  for (int chunk = lane % across; chunk < chunks; chunk += across) {
    const int c = 4 * chunk, n = block.first + c, count = min(block.most - n, 4);
    if (count <= 0) break;
    Column column[2][4];
#pragma unroll
    for (int e = 0; e < 4; e++) {
      column[0][e] = e < count ? column_of(p, n + e) : Column{};
      column[1][e] = p.pairs && e < count ? column_of(p, block.second + c + e) : Column{};
    }
#pragma unroll 1
    for (int r = lane / across; r < rows; r += 32 / across) {
      const int64_t m = row + r;
      float scale = 1.0f, y[2][4] = {}, residual[4] = {};
      int32_t zero = 0;
      if constexpr (!T::kGroups) scale = p.digits.scale[m], zero = p.digits.zero[m];
      if (l.residual) load_four(l, m, n, count, residual_wide, residual);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        if (half && !p.pairs) continue;
        const int32_t* at = cells + r * T::kPitch + half * T::kHalf + c;
        int32_t low[4], high[4] = {};
        load_cells(at, low);
        if constexpr (T::kTwo) load_cells(at + T::kCells / 2, high);
#pragma unroll
        for (int e = 0; e < 4; e++)
          y[half][e] = T::kGroups ? __fadd_rn(__int_as_float(low[e]), column[half][e].bias)
                                  : linear(column[half][e], scale, zero, low[e], high[e]);
      }
#pragma unroll
      for (int e = 0; e < 4; e++) y[0][e] = finish(l, p.pairs, y[0][e], y[1][e], residual[e]);
      put_four(l, m, n, count, out_wide, y[0]);
    }
  }
}

}  // namespace
}  // namespace llmkern::int8
