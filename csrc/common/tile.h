// Packing, and the product of two matrices of which one is packed: what attention and the losses of hidden states are
// made of.
#pragma once
#include <cstring>
#include <type_traits>

#include "arithmetic.h"
#include "simd.h"

namespace llmkern::LLMKERN_ISA {
namespace {

// A tile of the product: 6 rows times kVectors vectors leaves registers for one row of the packed operand.
constexpr int kTileRows = 6;
constexpr int kVectors = kRegisters >= 32 ? 4 : 2;
constexpr int kPanel = kVectors * kWidth;

// How a dtype is multiplied: bf16 pairs where the processor has an instruction for them, floats otherwise. Both are
// packed as units of 32 bits: one float, or two bf16 values that follow each other along the summed dimension.
template <class T>
constexpr bool kPairs = kBf16Dot && std::is_same<T, Bf16>::value;

template <int n>
using Number = std::integral_constant<int, n>;

// Consecutive pieces of one allocation.
struct Memory {
  float* next;
  float* take(int64_t units) {
    float* taken = next;
    next += round_up(units, 16);
    return taken;
  }
};

// The 32 bits of a unit.
LLMKERN_INLINE int32_t unit(const float* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return x;
}

template <bool kPair>
LLMKERN_INLINE Float multiply_add(const float* a, Float b, Float c) {
  if constexpr (kPair) {
    return dot_bf16(c, broadcast_int(unit(a)), as_int(b));
  } else {
    return fma(broadcast(*a), b, c);
  }
}

// A part [begin, end) of the summed dimension.
struct Span {
  int64_t begin, end;
};
constexpr int kMostSpans = 512 / kPanel;  // panels of a block of keys

constexpr int64_t kAhead = 16;  // how many rows ahead of its use memory is asked for

// The sum over the k in the spans of a[i * a_row + k * a_k] * b[k * ldb + j], for R rows i and V vectors of j. `ask`:
// so many vectors of a row of b are asked for ahead of their use.
template <bool kPair, int R, int V>
inline void tile(const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t ldb, const Span* spans,
                 int span_count, float* c, int64_t ldc, int ask = 0) {
  Float sum[R][V];
#pragma GCC unroll 8
  for (int i = 0; i < R; i++)
#pragma GCC unroll 16
    for (int j = 0; j < V; j++) sum[i][j] = zero();
  for (int s = 0; s < span_count; s++) {
    const float *x = a + spans[s].begin * a_k, *y = b + spans[s].begin * ldb;
    for (int64_t k = spans[s].begin; k < spans[s].end; k++) {
      Float row[V];
#pragma GCC unroll 16
      for (int j = 0; j < V; j++) row[j] = load(y + j * kWidth);
      if constexpr (R < kTileRows && V <= kVectors)
        for (int j = 0; j < ask; j++) __builtin_prefetch(y + kAhead * ldb + j * kWidth, 0, 2);
#pragma GCC unroll 8
      for (int i = 0; i < R; i++)
#pragma GCC unroll 16
        for (int j = 0; j < V; j++) sum[i][j] = multiply_add<kPair>(x + i * a_row, row[j], sum[i][j]);
      x += a_k;
      y += ldb;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; i++) {
#pragma GCC unroll 16
    for (int j = 0; j < V; j++) {
      float* to = c + i * ldc + j * kWidth;
      store(to, add(load(to), sum[i][j]));
    }
  }
}

// The same for any number of rows up to kTileRows and of vectors up to kVectors.
template <bool kPair, int V = kVectors>
void tile_rows(int rows, int vectors, const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t ldb,
               const Span* spans, int span_count, float* c, int64_t ldc, int ask) {
  if constexpr (V > 1) {
    if (vectors < V)
      return tile_rows<kPair, V - 1>(rows, vectors, a, a_row, a_k, b, ldb, spans, span_count, c, ldc, ask);
  }
  if (rows == kTileRows) return tile<kPair, kTileRows, V>(a, a_row, a_k, b, ldb, spans, span_count, c, ldc);
  if (rows >= 4) {
    tile<kPair, 4, V>(a, a_row, a_k, b, ldb, spans, span_count, c, ldc, ask);
    a += 4 * a_row, c += 4 * ldc, rows -= 4;
  }
  if (rows >= 2) {
    tile<kPair, 2, V>(a, a_row, a_k, b, ldb, spans, span_count, c, ldc, ask);
    a += 2 * a_row, c += 2 * ldc, rows -= 2;
  }
  if (rows) tile<kPair, 1, V>(a, a_row, a_k, b, ldb, spans, span_count, c, ldc);
}

// How a product along a row is summed. Floats in several chains, of a quarter or half of a piece each: about as exact
// as a dot product by vectors, which is what one query alone gets from torch, and no row's result may depend on how
// many there are.
constexpr int kChains = kRegisters >= 32 ? 4 : 2;
constexpr int64_t kDepth = 16 * kChains;

LLMKERN_INLINE Float sum_chains(const Float* chains) {
  if constexpr (kChains == 2) return add(chains[0], chains[1]);
  return add(add(chains[0], chains[1]), add(chains[2], chains[kChains - 1]));
}

// c = factor * (c +) sum over d < depth of a[i * a_row + d] * panel[d * kPanel] for R rows and `vectors` vectors of
// keys, V at a time.
template <bool kPair, int R, int V>
inline void chained_tile(const float* a, int64_t a_row, const float* panel, int64_t depth, int vectors, float* c,
                         int64_t ldc, bool first, float factor) {
  for (int end = vectors / V * V, at = 0; at < end; at += V, panel += V * kWidth, c += V * kWidth) {
    Float sum[R][V][kChains];
#pragma GCC unroll 8
    for (int i = 0; i < R; i++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++)
#pragma GCC unroll 8
        for (int j = 0; j < kChains; j++) sum[i][v][j] = zero();
    auto one = [&](int64_t d, int j) {
      Float keys[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) keys[v] = load(panel + (d + j) * kPanel + v * kWidth);
#pragma GCC unroll 8
      for (int i = 0; i < R; i++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) sum[i][v][j] = multiply_add<kPair>(a + i * a_row + d + j, keys[v], sum[i][v][j]);
    };
    int64_t d = 0;
    for (; d + kChains <= depth; d += kChains)
#pragma GCC unroll 8
      for (int j = 0; j < kChains; j++) one(d, j);
#pragma GCC unroll 8
    for (int j = 0; j < kChains - 1; j++)
      if (d + j < depth) one(d, j);
#pragma GCC unroll 8
    for (int i = 0; i < R; i++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) {
        float* to = c + i * ldc + v * kWidth;
        Float total = sum_chains(sum[i][v]);
        if (!first) total = add(load(to), total);
        store(to, factor == 1 ? total : mul(total, broadcast(factor)));
      }
  }
}

// c = factor * (a times panels): scores of `rows` queries with `count` keys packed by pack_panels.
template <bool kPair>
void times_panels(int rows, const float* a, int64_t a_row, const float* panels, int64_t depth, int count, float* c,
                  int64_t ldc, float factor) {
  for (int j = 0; j < count; j += kPanel) {
    int left = count - j, vectors = left >= kPanel ? kVectors : (left + kWidth - 1) / kWidth;
    for (int i = 0; i < rows; i += kTileRows) {
      int n = rows - i < kTileRows ? rows - i : kTileRows;
      for (int64_t d = 0; d == 0 || d < depth; d += kDepth) {  // no width: zeros
        bool last = depth - d <= kDepth;
        // The rows from `row` on with the vectors [begin, end).
        auto tile = [&](auto r, auto v, int row, int begin, int end) {
          chained_tile<kPair, decltype(r)::value, decltype(v)::value>(
              a + (i + row) * a_row + d, a_row, panels + j * depth + d * kPanel + begin * kWidth,
              last ? depth - d : kDepth, end - begin, c + (i + row) * ldc + j + begin * kWidth, ldc, d == 0,
              last ? factor : 1);
        };
        if (n == kTileRows) {
          // With few registers two vectors and half of the rows: else a load for each sum would be the limit.
          int pairs = kRegisters < 32 ? vectors / 2 * 2 : 0;
          if (pairs)
            for (int row = 0; row < kTileRows; row += kTileRows / 2)
              tile(Number<kTileRows / 2>{}, Number<2>{}, row, 0, pairs);
          tile(Number<kTileRows>{}, Number<1>{}, 0, pairs, vectors);
          continue;
        }
        int row = 0;
        for (; row + 2 <= n; row += 2) tile(Number<2>{}, Number<1>{}, row, 0, vectors);
        if (row < n) tile(Number<1>{}, Number<1>{}, row, 0, vectors);
      }
    }
  }
}

// The products of kPanel rows with one each, from panels of both, summed in the order in which times_panels sums.
template <bool kPair>
void times_each(const float* a, const float* b, int64_t depth, float* to) {
  for (int row = 0; row < kPanel; row += kWidth) {
    Float total = zero();
    for (int64_t begin = 0; begin < depth; begin += kDepth) {
      Float chains[kChains];
      for (int j = 0; j < kChains; j++) chains[j] = zero();
      int64_t end = begin + kDepth < depth ? begin + kDepth : depth;
      for (int64_t d = begin; d < end; d++) {
        Float &chain = chains[(d - begin) % kChains], x = load(a + d * kPanel + row), y = load(b + d * kPanel + row);
        if constexpr (kPair)
          chain = dot_bf16(chain, as_int(x), as_int(y));
        else
          chain = fma(x, y, chain);
      }
      total = add(total, sum_chains(chains));
    }
    store(to + row, total);
  }
}

// c += a times the packed rows of b in the spans, ldb apart and `width` (a multiple of kWidth) wide, c of that width.
// Where `skip_zeros` (b holds infinities or NaN), an element of a that is exactly 0 takes no part in the sum. Far: b is
// not packed, and may come from memory.
template <bool kPair>
void times_piece(int rows, const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t ldb, int64_t width,
                 const Span* spans, int span_count, float* c, bool skip_zeros, bool far) {
  if (!skip_zeros) {
    int64_t j = 0;
    auto wide = [&](auto r, auto v) {
      tile<kPair, decltype(r)::value, decltype(v)::value>(a, a_row, a_k, b + j, ldb, spans, span_count, c + j, width);
      j += decltype(v)::value * kWidth;
    };
    // One or two rows of sums leave registers for more of them: rows of b are then read as they lie, end to end.
    if (rows == 1)
      while (width - j >= 4 * kPanel) wide(Number<1>{}, Number<4 * kVectors>{});
    while (rows <= 2 && width - j >= 2 * kPanel) {
      Number<2 * kVectors> vectors;
      rows == 1 ? wide(Number<1>{}, vectors) : wide(Number<2>{}, vectors);
    }
    for (; j < width; j += kPanel) {
      int64_t left = width - j;
      int vectors = left >= kPanel ? kVectors : static_cast<int>(left / kWidth);
      for (int i = 0; i < rows; i += kTileRows)
        tile_rows<kPair>(rows - i < kTileRows ? rows - i : kTileRows, vectors, a + i * a_row, a_row, a_k, b + j, ldb,
                         spans, span_count, c + i * width + j, width,
                         far && j == 0 ? static_cast<int>(width / kWidth) : 0);
    }
    return;
  }
  for (int i = 0; i < rows; i++) {
    for (int64_t j = 0; j < width; j += kWidth) {
      Float sum = zero();
      for (int s = 0; s < span_count; s++)
        for (int64_t k = spans[s].begin; k < spans[s].end; k++) {
          const float* x = a + i * a_row + k * a_k;
          if constexpr (kPair) {
            uint16_t weight[2], part[2 * kWidth];
            std::memcpy(weight, x, 4);
            std::memcpy(part, b + k * ldb + j, sizeof part);
            for (int l = 0; l < 2 * kWidth; l++) part[l] = weight[l & 1] ? part[l] : 0;
            float packed[kWidth];
            std::memcpy(packed, part, sizeof part);
            sum = multiply_add<true>(x, load(packed), sum);
          } else if (*x != 0) {
            sum = fma(broadcast(*x), load(b + k * ldb + j), sum);
          }
        }
      float* to = c + i * width + j;
      store(to, add(load(to), sum));
    }
  }
}

// So many rows are summed in one chain at most, in pieces that begin at multiples of it: values of one sign add up to a
// sum whose every rounding is as large as its own, and the plain version's vectors have short chains too. Pairs round
// more beforehand than any order of the sum does.
constexpr int64_t kChainRows = 128;

// The same, piece by piece.
template <bool kPair>
void times_rows(int rows, const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t ldb, int64_t width,
                const Span* spans, int span_count, float* c, bool skip_zeros, bool far = false) {
  if (kPair || !span_count || spans[span_count - 1].end <= kChainRows)
    return times_piece<kPair>(rows, a, a_row, a_k, b, ldb, width, spans, span_count, c, skip_zeros, far);
  Span part[kMostSpans];
  for (int64_t begin = 0; begin < spans[span_count - 1].end; begin += kChainRows) {
    int count = 0;
    for (int s = 0; s < span_count; s++) {
      int64_t from = spans[s].begin > begin ? spans[s].begin : begin;
      int64_t to = spans[s].end < begin + kChainRows ? spans[s].end : begin + kChainRows;
      if (from < to) part[count++] = {from, to};
    }
    if (count) times_piece<kPair>(rows, a, a_row, a_k, b, ldb, width, part, count, c, skip_zeros, far);
  }
}

// One row of n elements as units, zeros up to `units`.
template <bool kPair, class T>
LLMKERN_INLINE void pack_row(float* to, const T* from, int64_t n, int64_t units) {
  if constexpr (kPair) {
    std::memcpy(to, from, 2 * static_cast<size_t>(n));
    std::memset(reinterpret_cast<uint16_t*>(to) + n, 0, static_cast<size_t>(4 * units - 2 * n));
  } else {
    int64_t d = 0;
    for (; d + kWidth <= n; d += kWidth) store(to + d, load(from + d));
    if (d < n) store_first(to + d, load_first(from + d, static_cast<int>(n - d)), static_cast<int>(n - d));
    for (d = n; d < units; d++) to[d] = 0;
  }
}

// kWidth rows of one vector of units each: `rows` are there, the others zero, and of each row `elements`.
template <bool kPair, class T>
LLMKERN_INLINE void load_square(Float* to, const T* from, int64_t step, int rows, int elements) {
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; i++) {
    if (i >= rows) {
      to[i] = zero();
    } else if constexpr (kPair) {
      const float* p = reinterpret_cast<const float*>(from + i * step);
      __builtin_prefetch(from + (i + 2 * kAhead) * step, 0, 2);
      if (elements == 2 * kWidth) {
        to[i] = load(p);
      } else {  // an odd row ends in half a unit
        alignas(64) float units[kWidth] = {};
        std::memcpy(units, p, 2 * static_cast<size_t>(elements));
        to[i] = load(units);
      }
    } else {
      to[i] = elements == kWidth ? load(from + i * step) : load_first(from + i * step, elements);
      __builtin_prefetch(from + (i + 2 * kAhead) * step, 0, 2);
    }
  }
}

// `count` rows into panels of kPanel rows, transposed: panel[unit][row], zeros past the last.
template <bool kPair, class T>
void pack_panels(float* panels, const T* from, int64_t step, int64_t count, int64_t n, int64_t units) {
  constexpr int kElements = kPair ? 2 : 1;  // of a unit
  for (int64_t r = 0; r < round_up(count, kPanel); r += kWidth) {
    float* to = panels + r / kPanel * kPanel * units + r % kPanel;
    int rows = count - r >= kWidth ? kWidth : count > r ? static_cast<int>(count - r) : 0;
    const T* source = from + r * step;
    int64_t u = 0;
    for (; (u + kWidth) * kElements <= n; u += kWidth) {
      Float square[kWidth];
      if (rows == kWidth)
        load_square<kPair>(square, source + u * kElements, step, kWidth, kWidth * kElements);
      else
        load_square<kPair>(square, source + u * kElements, step, rows, kWidth * kElements);
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; i++) store(to + (u + i) * kPanel, square[i]);
    }
    if (u < units) {
      Float square[kWidth];
      load_square<kPair>(square, source + u * kElements, step, rows, static_cast<int>(n - u * kElements));
      transpose(square);
      for (int i = 0; i < units - u; i++) store(to + (u + i) * kPanel, square[i]);
    }
  }
}

// `count` rows, padded to `width` units; pairs of rows interleaved where kPair, and an odd last row paired with zeros.
// Returns whether anything in them is infinite or NaN.
template <bool kPair, class T>
bool pack_rows(float* to, const T* from, int64_t step, int64_t count, int64_t n, int64_t width) {
  if constexpr (kPair) {
    uint32_t special = 0;
    for (int64_t r = 0; r < count; r += 2) {
      const uint16_t* a = reinterpret_cast<const uint16_t*>(from + r * step);
      const uint16_t* b = r + 1 < count ? a + step : nullptr;
      uint32_t* out = reinterpret_cast<uint32_t*>(to + r / 2 * width);
      for (int64_t d = 0; d < n; d++) {
        uint32_t x = a[d], y = b ? b[d] : 0;
        special |= static_cast<uint32_t>((x & 0x7f80u) == 0x7f80u) | static_cast<uint32_t>((y & 0x7f80u) == 0x7f80u);
        out[d] = x | y << 16;
      }
      for (int64_t d = n; d < width; d++) out[d] = 0;
    }
    return special != 0;
  } else {
    Float special = zero();  // NaN as soon as something is not finite
    for (int64_t r = 0; r < count; r++) {
      float* out = to + r * width;
      pack_row<false>(out, from + r * step, n, width);
      for (int64_t d = 0; d < width; d += kWidth) special = fma(load(out + d), zero(), special);
    }
    return sum(special) != 0;
  }
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
