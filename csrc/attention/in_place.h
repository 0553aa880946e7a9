// The two products of attention for few queries, from the rows of keys and values as they lie in memory: packing them
// would cost more than it saves where a row meets a handful of queries. The sums are formed in the order in which
// times_panels and times_rows form them on packed rows, so that the results are the same bit for bit.
#pragma once
#include "online.h"
#include "source.h"

#ifdef LLMKERN_QUADS
namespace llmkern::LLMKERN_ISA {
namespace {

// Asks for the cache lines of rows, one after the other: from memory, lines that come in their order come at twice the
// rate of those asked for in the order of use, a column of lines of kWidth rows at a time.
template <bool kEndToEnd, class T>
class Lines {
 public:
  Lines(const T* row, int64_t elements, int64_t step)
      : next_(reinterpret_cast<const char*>(row)),
        bytes_(at_least(1, elements * int64_t{sizeof(T)})),
        jump_(step * int64_t{sizeof(T)} - round_up(bytes_, kLine)),
        left_(bytes_) {}
  __attribute__((always_inline)) void ask() {
    __builtin_prefetch(next_, 0, 2);
    next_ += kLine;
    if constexpr (kEndToEnd) return;
    left_ -= kLine;
    bool over = left_ <= 0;
    next_ += over ? jump_ : 0, left_ += over ? bytes_ : 0;
  }

 private:
  static constexpr int64_t kLine = 64;
  const char* next_;
  int64_t bytes_, jump_, left_;
};

// How many rows lie between the keys that are met and those asked for: whole panels, some 16 KB.
template <class T>
int64_t rows_ahead(int64_t elements) {
  return kPanel * at_least(1, 16384 / at_least(1, kPanel * elements * int64_t{sizeof(T)}));
}

// A row of `depth` units with each quad twice, as the products with two keys read it; zeros up to whole halves of a
// register: spread_units of it.
inline int64_t spread_units(int64_t depth) { return 2 * round_up(depth, kWidth / 2); }
inline void spread_quads(float* to, const float* from, int64_t depth) {
  for (int64_t u = 0; u < round_up(depth, kWidth / 2); u += 4, to += 8)
    for (int i = 0; i < 4; i++) to[i] = to[4 + i] = u + i < depth ? from[u + i] : 0;
}

// The scores of R queries with the kWidth keys from `keys` on; without kWhole, `count` of them are there, or the
// elements make no whole halves of registers. Key i goes to quad i / 4 of vector i % 4, so that a quad holds the four
// chains of one key (kChains) and no packed copy is needed. queries: spread_quads of them, `step` apart; ahead: rows
// that are asked for meanwhile.
template <bool kPair, int R, bool kWhole, bool kEndToEnd, class T>
__attribute__((always_inline)) inline void scores_in_place(const float* queries, int64_t step, const T* keys,
                                                           int64_t key_step, int count, int64_t elements, float* scores,
                                                           float factor, const Slice<T>& ahead) {
  static_assert(kChains == 4 && kWidth == 16);
  constexpr int kElements = kPair ? 2 : 1, kStep = kWidth / 2 * kElements;  // of a unit, of half a register
  auto row = [&](int i, int64_t e) { return keys + e + (kWhole || i < count ? i : count - 1) * key_step; };
  Lines<kEndToEnd, T> lines(ahead.data, elements, ahead.step);
  Float total[R];
  for (int64_t begin = 0; begin == 0 || begin < elements; begin += kDepth * kElements) {
    int64_t end = at_most(elements, begin + kDepth * kElements);
    Half sums[2][4][R];  // of vector j, its quads 2 h and 2 h + 1
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
      Half sum[4][R];
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++)
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) sum[j][r] = zero_half();
      auto some = [&](int64_t e, auto load_part) {
        const float* of_queries = queries + 2 * (e / kElements);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
          Half a = load_part(row(8 * h + j, e)), b = load_part(row(8 * h + 4 + j, e));
          if constexpr (kWhole) lines.ask();
          exchange_quads(a, b);
#pragma GCC unroll 8
          for (int r = 0; r < R; r++) {
            const float* query = of_queries + r * step;
            sum[j][r] = multiply_add_halves<kPair>(near_half(query), a, sum[j][r]);
            sum[j][r] = multiply_add_halves<kPair>(near_half(query + 8), b, sum[j][r]);
          }
        }
      };
      int64_t e = begin;
      for (; e + kStep <= end; e += kStep) some(e, [](const T* p) { return load_half(p); });
      if constexpr (!kWhole)
        if (e < end)
          some(e, [&](const T* p) {
            alignas(32) T part[kStep] = {};
            std::memcpy(part, p, sizeof(T) * static_cast<size_t>(end - e));
            return load_half(part);
          });
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++)
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) sums[h][j][r] = sum[j][r];
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      Float chains[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) chains[j] = join(sums[0][j][r], sums[1][j][r]);
      transpose_in_quads(chains[0], chains[1], chains[2], chains[3]);
      Float of_piece = sum_chains(chains);
      total[r] = begin == 0 ? of_piece : add(total[r], of_piece);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) store(scores + r * kBlockKeys, factor == 1 ? total[r] : mul(total[r], broadcast(factor)));
}

// The same for up to kTileRows queries and any number of keys.
template <bool kPair, class T, int R = kTileRows>
__attribute__((noinline)) void all_scores_in_place(int n, const float* queries, int64_t step, const Slice<T>& keys,
                                                   int count, int64_t elements, float* scores, float factor,
                                                   const Slice<T>& ahead) {
  if constexpr (R > 1) {
    if (n < R)
      return all_scores_in_place<kPair, T, R - 1>(n, queries, step, keys, count, elements, scores, factor, ahead);
  }
  int c = 0, whole = elements % (kWidth / 2 * (kPair ? 2 : 1)) == 0 ? count : 0;
  auto some = [&](auto is_whole, auto end_to_end) __attribute__((always_inline)) {
    scores_in_place<kPair, R, decltype(is_whole)::value, decltype(end_to_end)::value>(
        queries, step, keys.data + c * keys.step, keys.step, count - c, elements, scores + c, factor,
        Slice<T>{ahead.data + c * ahead.step, ahead.step});
  };
  // With few rows going in and out of a function would take a fifth of the time; with many the registers do not last.
  auto apart = [&](auto is_whole, auto end_to_end) __attribute__((noinline)) { some(is_whole, end_to_end); };
  auto all = [&](auto is_whole, auto end_to_end, int end) __attribute__((always_inline)) {
    for (; c + kWidth <= end; c += kWidth)
      if constexpr (R <= 2)
        some(is_whole, end_to_end);
      else
        apart(is_whole, end_to_end);
  };
  if (ahead.step == elements)
    all(std::true_type{}, std::true_type{}, whole);
  else
    all(std::true_type{}, std::false_type{}, whole);
  for (; c < count; c += kWidth) apart(std::false_type{}, std::true_type{});
}

// The rows of a block of values, kRun at a time.
struct Runs {
  static constexpr int64_t kRun = Source<Bf16>::kGather;
  Slice<Bf16> rows[kBlockKeys / kRun];
};

// 32 V columns from `column` on: c += the sum over pairs of rows, of which those from `count` on are zeros. `ask`: so
// many times 32 columns are asked for ahead of their use.
template <int R, int V>
inline void values_in_place(const float* weights, const Runs& values, int64_t column, int ask, const Span* spans,
                            int span_count, int64_t count, float* c, int64_t ldc) {
  alignas(64) static const Bf16 none[32 * V] = {};
  Float sum[R][2 * V];
#pragma GCC unroll 8
  for (int i = 0; i < R; i++)
#pragma GCC unroll 8
    for (int v = 0; v < 2 * V; v++) sum[i][v] = zero();
  for (int s = 0; s < span_count; s++)
    for (int64_t k = spans[s].begin; k < spans[s].end; k++) {
      const Slice<Bf16>& run = values.rows[2 * k / Runs::kRun];
      int64_t step = run.step;
      const Bf16* x = run.data + 2 * k % Runs::kRun * step + column;
      const Bf16* y = 2 * k + 1 < count ? x + step : none;
      Float pairs[2 * V];
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) pair(x + 32 * v, y + 32 * v, pairs[2 * v], pairs[2 * v + 1]);
      for (int v = 0; v < ask; v++) __builtin_prefetch(x + kAhead * step + 32 * v, 0, 2);
      for (int v = 0; v < ask; v++) __builtin_prefetch(x + (kAhead + 1) * step + 32 * v, 0, 2);
#pragma GCC unroll 8
      for (int i = 0; i < R; i++) {
        Int weight = broadcast_int(unit(weights + i * kBlockKeys + k));
#pragma GCC unroll 8
        for (int v = 0; v < 2 * V; v++) sum[i][v] = dot_bf16(sum[i][v], weight, as_int(pairs[v]));
      }
    }
#pragma GCC unroll 8
  for (int i = 0; i < R; i++) {
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
      Float low = sum[i][2 * v], high = sum[i][2 * v + 1];
      in_order(low, high);
      float* to = c + i * ldc + 32 * v;
      store(to, add(load(to), low));
      store(to + kWidth, add(load(to + kWidth), high));
    }
  }
}

// The same for up to kTileRows rows of weights and a width that is a multiple of 32.
template <int R = kTileRows>
__attribute__((noinline)) void all_values_in_place(int n, const float* weights, const Runs& values, int64_t width,
                                                   const Span* spans, int span_count, int64_t count, float* c) {
  if constexpr (R > 1) {
    if (n < R) return all_values_in_place<R - 1>(n, weights, values, width, spans, span_count, count, c);
  }
  // Rows are asked for whole, and read whole where the sums leave registers for it.
  int64_t j = 0;
  int ask = static_cast<int>(width / 32);
  auto some = [&](auto v) {
    constexpr int kColumns = decltype(v)::value;
    values_in_place<R, kColumns>(weights, values, j, ask, spans, span_count, count, c + j, width);
    j += 32 * kColumns, ask = 0;
  };
  if constexpr (R <= 2)
    while (width - j >= 128) some(Number<4>{});
  while (width - j >= 64) some(Number<2>{});
  if (j < width) some(Number<1>{});
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
#endif
