// The online softmax of the forward kernel (Milakov and Gimelshein 2018): what is known of each query after some keys,
// and the step that takes it through a block of keys.
//
// The keys are cut into blocks at fixed places. What a query makes of each is summed apart and then merged from the
// first block to the last, whoever computes them and whatever other queries are at hand: this is why a row's result is
// the same bit for bit for any batch, chunk of the prompt, number of threads, and for one query at a time.
#pragma once
#include <cmath>

#include "../common/tile.h"
#include "mask.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int kBlockKeys = 512;    // the largest score so far is looked up this often
constexpr int kBlockQueries = 96;  // queries of one head that go through the keys together

// Sizes of the packed forms, in units of 32 bits.
template <class T>
struct Sizes {
  explicit Sizes(const AttentionParams& p)
      : depth(kPairs<T> ? (p.width + 1) / 2 : p.width),
        value_width(round_up(p.value_width, kWidth)),
        blocks(at_least(1, (p.keys + kBlockKeys - 1) / kBlockKeys)) {}
  int64_t depth, value_width, blocks;

  static constexpr int64_t kValueRows = kPairs<T> ? kBlockKeys / 2 : kBlockKeys;  // of a packed block
  int64_t key_units() const { return kBlockKeys * depth; }
  int64_t value_units() const { return kValueRows * value_width; }
};

// What some rows know after some keys: not yet divided by the sum of their weights.
struct State {
  State(Memory& memory, int64_t rows, int64_t value_width)
      : output(memory.take(rows * value_width)), sums(memory.take(rows * kWidth)), largest(memory.take(rows)) {}
  static int64_t units(int64_t rows, int64_t value_width) { return rows * (value_width + kWidth + 1) + 48; }
  float* output;   // (rows, value_width): the sum of weights times values
  float* sums;     // (rows, kWidth): the sum of the weights, lane by lane
  float* largest;  // (rows): the largest score

  void clear(int64_t rows, int64_t value_width) const {
    std::memset(output, 0, static_cast<size_t>(4 * rows * value_width));
    std::memset(sums, 0, static_cast<size_t>(4 * rows * kWidth));
    for (int64_t i = 0; i < rows; i++) largest[i] = minus_infinity();
  }
  // Row i goes on from what it knows here and what it knows there, of later keys.
  void merge(int64_t i, const State& later, int64_t j, int64_t value_width) const {
    float a = largest[i], b = later.largest[j], now = a > b ? a : b;
    if (b == minus_infinity() && sum(load(later.sums + j * kWidth)) == 0) return;  // it saw nothing there
    float shift = now == minus_infinity() ? 0 : now;
    alignas(64) float of_here[kWidth], of_there[kWidth];
    store(of_here, exp_negative(broadcast(a - shift)));
    store(of_there, exp_negative(broadcast(b - shift)));
    Float here = broadcast(a == now ? 1.0f : of_here[0]), there = broadcast(b == now ? 1.0f : of_there[0]);
    auto both = [&](float* x, const float* y) { store(x, fma(load(x), here, mul(load(y), there))); };
    both(sums + i * kWidth, later.sums + j * kWidth);
    for (int64_t d = 0; d < value_width; d += kWidth)
      both(output + i * value_width + d, later.output + j * value_width + d);
    largest[i] = now;
  }
};

// The queries of some rows, packed, and which they are.
struct Queries {
  const float* packed;    // (rows, depth)
  const HeadMask* masks;  // of the heads
  int64_t begin, count;   // row i is query begin + i % count of head i / count of `masks`
  int64_t rows;
};

// The rows [first, first + n) that a tile works on.
struct Strip {
  Strip(const Queries& q, int64_t first) : n(static_cast<int>(at_most(kTileRows, q.rows - first))) {
    int64_t head = first / q.count, query = first % q.count;
    for (int i = 0; i < n; i++) {
      masks[i] = q.masks + head;
      queries[i] = q.begin + query;
      if (++query == q.count) head++, query = 0;
      int64_t from = masks[i]->start(queries[i]), to = masks[i]->limit(queries[i]);
      start = at_most(start, from), limit = at_least(limit, to);
      all_from = at_least(all_from, from), all_to = at_most(all_to, to);
    }
  }
  int n;
  const HeadMask* masks[kTileRows];
  int64_t queries[kTileRows];
  // Some row may see keys of [start, limit), every row sees [all_from, all_to), but for the dense mask.
  int64_t start = INT64_MAX, limit = 0, all_from = 0, all_to = INT64_MAX;

  // The panels of the block [key, key + count) in which some row sees a key, as spans relative to `key`; `whole` tells
  // for each panel whether every row sees all of it.
  int panels(int64_t key, int64_t count, Span* spans, bool* whole) const {
    int found = 0;
    bool dense = masks[0]->dense();
    int64_t to = at_most(count, limit - key);
    for (int64_t c = at_least(0, start - key) / kPanel * kPanel; c < to; c += kPanel) {
      int64_t end = at_most(c + kPanel, to);
      bool all = all_from <= key + c && key + end <= all_to;
      if (dense) {
        bool any = false;
        for (int i = 0; i < n && (!any || all); i++) {
          Seen seen = masks[i]->look(queries[i], key + c, key + end);
          any |= seen != Seen::none, all &= seen == Seen::all;
        }
        if (!any) continue;
      }
      whole[c / kPanel] = all && end % kWidth == 0;
      if (found && spans[found - 1].end == c)
        spans[found - 1].end = end;
      else
        spans[found++] = {c, end};
    }
    return found;
  }
};

// The scores of a tile's rows in a block, over which their weights are written: as floats, or as bf16 in the first half
// of the row.
struct Tile {
  explicit Tile(Memory& memory) : scores(memory.take(kUnits)) {}
  static constexpr int64_t kUnits = kTileRows * kBlockKeys;
  float* scores;
};

// Scores times `scale` (which is positive) become weights relative to the largest. whole[c / kPanel]: no score of that
// panel is masked.
template <class T>
void soften(const Tile& tile, int n, const Span* spans, int span_count, const bool* whole, float scale, float* most,
            float* sums) {
  float shift[kTileRows];
  for (int i = 0; i < n; i++) {
    const float* s = tile.scores + i * kBlockKeys;
    Float m0 = broadcast(minus_infinity()), m1 = m0;
    for (int k = 0; k < span_count; k++) {
      int64_t c = spans[k].begin;
      for (; c + kWidth < spans[k].end; c += 2 * kWidth) m0 = max(m0, load(s + c)), m1 = max(m1, load(s + c + kWidth));
      if (c < spans[k].end) m0 = max(m0, load(s + c));
    }
    most[i] = largest(max(m0, m1)) * scale;
    // Nothing seen: any finite value, so that e^(-infinity - it) is 0.
    shift[i] = most[i] == minus_infinity() ? 0 : most[i];
  }
  Float factor = broadcast(scale);
  for (int i = 0; i < n; i++) {
    float *s = tile.scores + i * kBlockKeys, *weights = s;
    Float by = broadcast(-shift[i]), sum0 = zero(), sum1 = zero();
    auto some = [&](auto is_whole, int64_t c, int64_t end) {
      auto weight = [&](int64_t at) {
        return exp_negative<kPairs<T>, !decltype(is_whole)::value>(fma(load(s + at), factor, by));
      };
      for (; c + kWidth < end; c += 2 * kWidth) {
        Float a = weight(c), b = weight(c + kWidth);
        sum0 = add(sum0, a), sum1 = add(sum1, b);
        if constexpr (kPairs<T>)
          store_flushed(reinterpret_cast<Bf16*>(weights) + c, a, b);
        else
          store(weights + c, a), store(weights + c + kWidth, b);
      }
      if (c >= end) return;
      Float a = weight(c);
      sum0 = add(sum0, a);
      if constexpr (kPairs<T>)
        store_flushed(reinterpret_cast<Bf16*>(weights) + c, a);
      else
        store(weights + c, a);
    };
    for (int k = 0; k < span_count; k++)
      for (int64_t c = spans[k].begin; c < spans[k].end; c += kPanel) {
        int64_t end = at_most(c + kPanel, spans[k].end);
        if (whole[c / kPanel])
          some(std::true_type{}, c, end);
        else
          some(std::false_type{}, c, end);
      }
    store(sums + i * kWidth, add(sum0, sum1));
  }
}

// Sets the weights that are dropped to 0; the others are made up for at the end.
template <class T>
void drop(const Tile& tile, const Strip& strip, const Span* spans, int span_count, int64_t key) {
  alignas(64) float kept[kBlockKeys + 64];
  for (int i = 0; i < strip.n; i++)
    for (int k = 0; k < span_count; k++) {
      int64_t begin = spans[k].begin, end = spans[k].end;
      strip.masks[i]->kept(kept, strip.queries[i], key + begin, static_cast<int>(end - begin));
      float* weights = tile.scores + i * kBlockKeys;
      if constexpr (kPairs<T>) {
        auto* w = reinterpret_cast<uint16_t*>(weights);
        for (int64_t c = begin; c < end; c++) w[c] = kept[c - begin] != 0 ? w[c] : uint16_t{0};
      } else {
        for (int64_t c = begin; c < end; c += kWidth)
          store(weights + c, mul(load(weights + c), load(kept + c - begin)));
      }
    }
}

// The strip at `row` meets the keys [key, key + count) of a block. score(c, n, factor) gives the tile factor times the
// products with the n keys from key + c on; add_up(spans, span_count) adds the weighted values to the state, which is
// clear.
template <class T, class Score, class AddUp>
void meet(const AttentionParams& p, const Strip& strip, int64_t row, int64_t key, int64_t count, const Tile& tile,
          const State& state, Score score, AddUp add_up) {
  Span spans[kBlockKeys / kPanel];
  bool whole[kBlockKeys / kPanel];
  int span_count = strip.panels(key, count, spans, whole);
  if (!span_count) return;
  // A power of two waits for the exponential, where it costs nothing and rounds nothing (the backward scales first).
  int exponent;
  bool late = std::frexp(p.scale, &exponent) == 0.5f && !strip.masks[0]->changes_scores();
  float late_scale = late ? p.scale : 1;
  for (int k = 0; k < span_count; k++) {
    int begin = static_cast<int>(spans[k].begin), end = static_cast<int>(spans[k].end);
    for (int c = begin; c < end; c += kPanel) {
      int panel_count = end - c < kPanel ? end - c : kPanel;
      score(c, panel_count, late ? 1 : p.scale);
      if (strip.masks[0]->bends())
        for (int i = 0; i < strip.n; i++)
          strip.masks[i]->bend(tile.scores + i * kBlockKeys + c, strip.queries[i], key + c, panel_count);
      if (whole[c / kPanel]) continue;
      for (int i = 0; i < strip.n; i++)
        strip.masks[i]->apply(tile.scores + i * kBlockKeys + c, strip.queries[i], key + c, panel_count);
    }
  }
  soften<T>(tile, strip.n, spans, span_count, whole, late_scale, state.largest + row, state.sums + row * kWidth);
  if (strip.masks[0]->drops()) drop<T>(tile, strip, spans, span_count, key);
  if constexpr (kPairs<T>)
    for (int k = 0; k < span_count; k++) spans[k].begin /= 2, spans[k].end = (spans[k].end + 1) / 2;
  add_up(spans, span_count);
}

// Scores of a strip from packed keys: panel(c) gives the panel of the keys from c on.
template <class T, class Panel>
auto packed_scores(const Sizes<T>& sizes, const Queries& q, const Strip& strip, int64_t row, const Tile& tile,
                   Panel panel) {
  return [&sizes, &q, &strip, row, &tile, panel](int64_t c, int count, float factor) {
    times_panels<kPairs<T>>(strip.n, q.packed + row * sizes.depth, sizes.depth, panel(c), sizes.depth, count,
                            tile.scores + c, kBlockKeys, factor);
  };
}

// Sums of packed values, whose rows are ldv apart. Careful: a value of weight 0 has no part, be it infinite or NaN.
// Far: they are not packed, but as they lie.
template <class T>
auto packed_sums(const Sizes<T>& sizes, const Strip& strip, int64_t row, const Tile& tile, const State& state,
                 const float* values, int64_t ldv, bool careful, bool far = false) {
  return [&sizes, &strip, row, &tile, &state, values, ldv, careful, far](const Span* spans, int span_count) {
    times_rows<kPairs<T>>(strip.n, tile.scores, kBlockKeys, 1, values, ldv, sizes.value_width, spans, span_count,
                          state.output + row * sizes.value_width, careful, far);
  };
}

// Whether all of the sums are finite: where not, a masked value may have had a part, and it is done again carefully.
inline bool finite(const State& state, int64_t rows, int64_t value_width) {
  Float broken = zero();
  for (int64_t i = 0; i < rows * value_width; i += kWidth) broken = fma(load(state.output + i), zero(), broken);
  return sum(broken) == 0;
}

// The result of row i of the state, query `row` of (s, h), and its log-sum-exp. `average` gives the average of the
// values.
template <class T, class Average>
void finish(const AttentionParams& p, const Sizes<T>& sizes, const State& state, int64_t i, const Sequence& s,
            int64_t h, int64_t row, Average average) {
  const float* from = state.output + i * sizes.value_width;
  double largest = state.largest[i], total = static_cast<double>(sum(load(state.sums + i * kWidth)));
  double logsumexp = total == 0 ? -__builtin_inf() : largest + __builtin_log(total);
  bool empty = total == 0 && largest == -__builtin_inf();  // every key is masked
  if (p.sink) {                                            // one more score, without a value
    double sink = static_cast<double>(p.sink[h]), with_sink = total + __builtin_exp(sink - largest);
    // So much above the scores that nothing is left of them: it is the sum.
    logsumexp = empty || with_sink == __builtin_inf() ? sink : largest + __builtin_log(with_sink);
    total = with_sink;
  } else if (empty && p.uniform_empty_rows && s.keys) {
    from = average();
  }
  if (empty) total = 1;
  p.logsumexp[s.row(p, h) + row] = logsumexp;
  T* to = const_cast<T*>(queries_of<T>(p.output, s, h)) + row * p.output.row;
  Float by = broadcast(static_cast<float>(total)), kept = broadcast(p.keep_scale);
  auto result = [&](int64_t d) {
    Float x = div(load(from + d), by);
    return p.drop_below ? mul(x, kept) : x;
  };
  int64_t d = 0;
  for (; d + kWidth <= p.value_width; d += kWidth) store(to + d, result(d));
  if (d < p.value_width) store_first(to + d, result(d), static_cast<int>(p.value_width - d));
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
