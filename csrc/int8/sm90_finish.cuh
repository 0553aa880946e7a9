// Results of the int8 tiles for Hopper: from sums in wgmma's layout to rows in memory.
//
// A warp has 16 rows of the tile. It writes its sums into shared memory, and reads them back four columns to a thread,
// so that what follows is in loops, and results and residuals are accessed by whole sectors.
#pragma once
#include "sm90_tile.cuh"

namespace llmkern::int8::sm90 {

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
struct alignas(16) Four {
  X x[4];
};

// What the thread with lane r of a warp knows of the warp's row r, r < 16.
struct RowScale {
  float scale;
  int32_t zero;
  LLMKERN_DEVICE RowScale(const Int8CudaParams& p, int row, int lane) : scale(0.0f), zero(0) {
    if (lane >= kWarpRows || row + lane >= p.linear.rows || p.digits.kind == Digits::groups) return;
    scale = p.digits.scale[row + lane], zero = p.digits.zero[row + lane];
  }
};

// Linear parts, functions and pairs of four columns from c on, in place of the (low) sums of the first ones.
template <class T>
LLMKERN_DEVICE void activate_columns(const Int8CudaParams& p, const Block& block, int32_t* cells, int c, int count,
                                     int first, int step) {
  Column column[2][4];
#pragma unroll
  for (int e = 0; e < 4; e++) {
    column[0][e] = e < count ? column_of(p, block.first + c + e) : Column{};
    column[1][e] = p.pairs && e < count ? column_of(p, block.second + c + e) : Column{};
  }
#pragma unroll 1
  for (int r = first; r < kWarpRows; r += step) {
    const float scale = __int_as_float(cells[T::kRowScales + r]);
    const int32_t zero = cells[T::kRowScales + kWarpRows + r];
    Four<float> y[2] = {};
#pragma unroll
    for (int half = 0; half < 2; half++) {
      if (half && !p.pairs) continue;
      const int32_t* at = cells + r * T::kPitch + half * T::kHalf + c;
      const auto low = *reinterpret_cast<const Four<int32_t>*>(at);
      Four<int32_t> high = {};
      if constexpr (T::kTwo) high = *reinterpret_cast<const Four<int32_t>*>(at + T::kHighCells);
#pragma unroll
      for (int e = 0; e < 4; e++)
        y[half].x[e] = T::kGroups ? __fadd_rn(__int_as_float(low.x[e]), column[half][e].bias)
                                  : linear(column[half][e], scale, zero, low.x[e], high.x[e]);
    }
#pragma unroll
    for (int e = 0; e < 4; e++) y[0].x[e] = activate_pair(p.linear, p.pairs, y[0].x[e], y[1].x[e]);
    *reinterpret_cast<Four<float>*>(cells + r * T::kPitch + c) = y[0];
  }
}

// cells: of this warp, with what store_cells wrote: low sums, then high ones; or totals. row: of the matrix, its first.
template <class T>
LLMKERN_DEVICE void finish_rows(const Int8CudaParams& p, const Block& block, int32_t* cells, int row, int lane) {
  constexpr int kAhead = 4;  // rows whose residuals are loaded before they are needed
  const Int8LinearParams& l = p.linear;
  const int chunks = (p.pairs ? T::kHalf : T::kColumns) / 4, across = chunks < 32 ? 16 : 32;
  const int first = lane / across, step = 32 / across, rows = min(kWarpRows, static_cast<int>(l.rows) - row);
  const bool out_wide = four_together(l, l.out, l.out_stride);
  const bool residual_wide = l.residual && four_together(l, l.residual, l.residual_stride);
#pragma unroll 1
  for (int chunk = lane % across; chunk < chunks; chunk += across) {
    const int c = 4 * chunk, n = block.first + c, count = min(block.most - n, 4);
    if (count <= 0) break;
    activate_columns<T>(p, block, cells, c, count, first, step);
#pragma unroll 1
    for (int begin = first; begin < rows; begin += kAhead * step) {
      float residual[kAhead][4] = {};
#pragma unroll
      for (int i = 0; i < kAhead; i++)
        if (l.residual && begin + i * step < rows)
          load_four(l, row + begin + i * step, n, count, residual_wide, residual[i]);
#pragma unroll
      for (int i = 0; i < kAhead; i++) {
        const int r = begin + i * step;
        if (r >= rows) continue;
        auto y = *reinterpret_cast<const Four<float>*>(cells + r * T::kPitch + c);
        if (l.residual) {
#pragma unroll
          for (int e = 0; e < 4; e++) y.x[e] = __fadd_rn(y.x[e], residual[i][e]);
        }
        put_four(l, row + r, n, count, out_wide, y.x);
      }
    }
  }
}

}  // namespace llmkern::int8::sm90
