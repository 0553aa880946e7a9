// Attention for the CPU, forward; compiled once per instruction set. docs/attention.md describes the algorithm,
// online.h its step.
//
// Two ways through the same steps. Many queries: the keys of a head are packed once, and blocks of queries go through
// them. Few queries (decoding): each block of keys is met by all queries of the heads that share it, and the blocks are
// merged at the end.
#include "../common/parallel.h"
#include "in_place.h"
#include "online.h"
#include "source.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int64_t kPackKeys = 128;  // of a block, packed at a time where threads share a head: a multiple of kGather
constexpr int64_t kFewRows = 64;    // queries that share a key head, up to which its keys are read once

template <class T>
struct Forward {
  const AttentionParams& p;
  Sizes<T> sizes;

  int64_t group() const { return p.heads / p.kv_heads; }
  Pieces key_pieces(int64_t size) const { return {p.key_bounds, p.batch, p.keys, size}; }

  Source<T> keys_of_head(const Sequence& s, int64_t kv_head) const {
    return {p, p.key, p.key_scales, s, kv_head, p.width};
  }
  Source<T> values_of_head(const Sequence& s, int64_t kv_head) const {
    return {p, p.value, p.value_scales, s, kv_head, p.value_width};
  }
  // function(first, past): [begin, end) as a whole, or in pieces that can be gathered.
  template <class Function>
  static void pieces(const Source<T>& source, int64_t begin, int64_t end, Function function) {
    if (!source.scattered()) return function(begin, end);
    for (int64_t r = begin; r < end; r += Source<T>::kGather) function(r, at_most(r + Source<T>::kGather, end));
  }
  // The rows [begin, end); begin is a multiple of kGather or all is one piece.
  void pack_keys(float* keys, const Source<T>& source, int64_t begin, int64_t end, float* space) const {
    pieces(source, begin, end, [&](int64_t first, int64_t past) {
      Slice<T> rows = source.rows(first, past, space);
      pack_panels<kPairs<T>>(keys + (first - begin) * sizes.depth, rows.data, rows.step, past - first, p.width,
                             sizes.depth);
    });
  }
  void pack_values(float* values, const Source<T>& source, int64_t begin, int64_t end, float* space) const {
    pieces(source, begin, end, [&](int64_t first, int64_t past) {
      Slice<T> rows = source.rows(first, past, space);
      pack_rows<kPairs<T>>(values + (first - begin) / (kPairs<T> ? 2 : 1) * sizes.value_width, rows.data, rows.step,
                           past - first, p.value_width, sizes.value_width);
    });
  }
  int64_t gathered_units() const {
    bool any = p.pages.table || p.key_scales.data;
    return any ? Source<T>::units(at_least(p.width, p.value_width)) : 0;
  }
  // Queries [begin, begin + count) of the heads [h, h + heads) into rows.
  void pack_queries(float* to, const Sequence& s, int64_t h, int64_t heads, int64_t begin, int64_t count) const {
    for (int64_t head = h; head < h + heads; head++) {
      const T* from = queries_of<T>(p.query, s, head) + begin * p.query.row;
      for (int64_t i = 0; i < count; i++, to += sizes.depth)
        pack_row<kPairs<T>>(to, from + i * p.query.row, p.width, sizes.depth);
    }
  }
  // The average of all values, made when it is asked for first.
  auto average(float* to, const Sequence& s, int64_t kv_head) const {
    return [this, to, &s, kv_head, made = false]() mutable -> const float* {
      if (made) return to;
      made = true;
      std::memset(to, 0, static_cast<size_t>(4 * sizes.value_width));
      const T* values = keys_of<T>(p.value, s, kv_head);
      for (int64_t k = 0; k < s.keys; k++)
        for (int64_t d = 0; d < p.value_width; d++) to[d] += load_one(values + k * p.value.row + d);
      for (int64_t d = 0; d < p.value_width; d++) to[d] /= static_cast<float>(s.keys);
      return to;
    };
  }

  // --- many queries
  int64_t block_units() const { return round_up(sizes.key_units() + sizes.value_units(), 16); }

  // Keys [begin, begin + count) or up to the last, within one block, which is packed at `to`.
  void pack_block(float* to, const Sequence& s, int64_t kv_head, int64_t begin, int64_t count, float* space) const {
    int64_t end = at_most(begin + count, s.keys), at = begin % kBlockKeys;
    if (begin >= end) return;
    pack_keys(to + at * sizes.depth, keys_of_head(s, kv_head), begin, end, space);
    pack_values(to + sizes.key_units() + at / (kPairs<T> ? 2 : 1) * sizes.value_width, values_of_head(s, kv_head),
                begin, end, space);
  }

  struct Work {
    explicit Work(const Forward& run)
        : memory{static_cast<float*>(scratch(
              Scratch::work, static_cast<size_t>(4 * (kBlockQueries * run.sizes.depth + Tile::kUnits +
                                                      run.sizes.value_width + run.gathered_units() + 64 +
                                                      2 * State::units(kBlockQueries, run.sizes.value_width)))))},
          queries(memory.take(kBlockQueries * run.sizes.depth)),
          tile(memory),
          state(memory, kBlockQueries, run.sizes.value_width),
          total(memory, kBlockQueries, run.sizes.value_width),
          average(memory.take(run.sizes.value_width)),
          space(memory.take(run.gathered_units())) {}
    Memory memory;
    float* queries;
    Tile tile;
    State state, total;
    float *average, *space;
  };

  // `count` queries of (s, h) from `begin` on, or up to the last, with the packed blocks of their keys.
  void attend(const float* blocks, const Sequence& s, int64_t h, int64_t begin, int64_t count, const Work& work) const {
    HeadMask mask(p, s, h);
    int64_t rows = at_most(count, s.queries - begin), width = sizes.value_width;
    Queries queries{work.queries, &mask, begin, rows, rows};
    pack_queries(work.queries, s, h, 1, begin, rows);
    int64_t first = mask.start(begin), limit = mask.limit(begin + rows - 1);
    auto through_the_keys = [&](bool careful) -> const State& {
      bool several = sizes.blocks > 1;
      if (several) work.total.clear(rows, width);
      work.state.clear(rows, width);
      for (int64_t key = first / kBlockKeys * kBlockKeys; key < limit; key += kBlockKeys) {
        const float* block = blocks + key / kBlockKeys * block_units();
        auto panel = [&](int64_t c) { return block + c * sizes.depth; };
        for (int64_t row = 0; row < rows; row += kTileRows) {
          Strip strip(queries, row);
          meet<T>(p, strip, row, key, at_most(kBlockKeys, s.keys - key), work.tile, work.state,
                  packed_scores(sizes, queries, strip, row, work.tile, panel),
                  packed_sums(sizes, strip, row, work.tile, work.state, block + sizes.key_units(), width, careful));
        }
        if (!several) break;
        for (int64_t i = 0; i < rows; i++) work.total.merge(i, work.state, i, width);
        if (key + kBlockKeys < limit) work.state.clear(rows, width);
      }
      return several ? work.total : work.state;
    };
    const State* state = &through_the_keys(false);
    if (!finite(*state, rows, width)) state = &through_the_keys(true);
    auto of_values = average(work.average, s, h / group());
    for (int64_t i = 0; i < rows; i++) finish(p, sizes, *state, i, s, h, begin + i, of_values);
  }

  void many_queries(int threads) const {
    int64_t kv_total = p.batch * p.kv_heads, head_units = sizes.blocks * block_units();
    Pieces keys = key_pieces(kBlockKeys);
    Counter counter;
    if (kv_total % threads == 0 || kv_total >= 8 * threads) {
      // Enough heads for all threads: each packs a head when it comes to it, while it is warm in its cache.
      auto body = [&](int, int) {
        auto* blocks = static_cast<float*>(scratch(Scratch::pack, static_cast<size_t>(4 * head_units)));
        Work work(*this);
        for (int64_t i = counter.take(); i < kv_total; i = counter.take()) {
          Sequence s(p, i / p.kv_heads);
          int64_t kv_head = i % p.kv_heads;
          for (int64_t block = 0; block * kBlockKeys < s.keys; block++)
            pack_block(blocks + block * block_units(), s, kv_head, block * kBlockKeys, kBlockKeys, work.space);
          for (int64_t h = kv_head * group(); h < (kv_head + 1) * group(); h++)
            for (int64_t q = 0; q < s.queries; q += kBlockQueries) attend(blocks, s, h, q, kBlockQueries, work);
        }
      };
      return parallel(threads, body);
    }
    int64_t each = keys.count();
    auto* packed =
        static_cast<float*>(scratch(Scratch::pack, static_cast<size_t>(4 * p.kv_heads * each * block_units())));
    auto block_of = [&](const Sequence& s, int64_t kv_head, int64_t block) {
      return packed + (kv_head * each + keys.first(s.b) + block) * block_units();
    };
    auto pack = [&](int, int) {
      Work work(*this);
      Pieces pieces = key_pieces(kPackKeys);
      for (int64_t i = counter.take(); i < p.kv_heads * pieces.count(); i = counter.take()) {
        int64_t kv_head = i % p.kv_heads, piece = i / p.kv_heads;
        Sequence s(p, pieces.sequence(piece));
        int64_t begin = (piece - pieces.first(s.b)) * kPackKeys;
        pack_block(block_of(s, kv_head, begin / kBlockKeys), s, kv_head, begin, kPackKeys, work.space);
      }
    };
    parallel(threads, pack);
    counter.next = 0;
    int64_t rows = rows_of_task(p, kBlockQueries, 2 * kTileRows, threads);
    Pieces queries(p.query_bounds, p.batch, p.queries, rows);
    auto body = [&](int, int) {
      Work work(*this);
      int64_t all = queries.count() * p.heads;
      for (int64_t i = counter.take(); i < all; i = counter.take()) {
        // The last blocks first: with a causal mask they are the longest.
        int64_t piece = queries.count() - 1 - i / p.heads, h = i % p.heads;
        Sequence s(p, queries.sequence(piece));
        int64_t q = (piece - queries.first(s.b)) * rows;
        if (q < s.queries) attend(block_of(s, h / group(), 0), s, h, q, rows, work);
      }
    };
    parallel(threads, body);
  }

  // --- few queries
  struct Few {
    Few(const Forward& run, int64_t rows)
        : memory{static_cast<float*>(scratch(
              Scratch::work,
              static_cast<size_t>(4 * (rows * run.sizes.depth + run.sizes.key_units() + run.sizes.value_units() +
                                       Tile::kUnits + run.sizes.value_width + run.gathered_units() + 128))))},
          queries(memory.take(rows * run.sizes.depth)),
          keys(memory.take(run.sizes.key_units())),
          values(memory.take(run.sizes.value_units())),
          tile(memory),
          average(memory.take(run.sizes.value_width)),
          space(memory.take(run.gathered_units())) {}
    Memory memory;
    float *queries, *keys, *values;
    Tile tile;
    float *average, *space;
  };

  // Whether values need no packing: whole vectors of floats as they lie.
  bool plain_values(const Source<T>& values) const {
    return std::is_same<T, float>::value && p.value_width % kWidth == 0 && !values.scattered();
  }

  // Whether values are paired as they are read: whole vectors of pairs.
  bool pairs_as_they_are_read() const {
#ifdef LLMKERN_QUADS
    return kPairs<T> && p.value_width % (2 * kWidth) == 0;
#else
    return false;
#endif
  }

  // All queries of the heads that share kv_head meet one block of keys.
  void attend_block(const Sequence& s, int64_t kv_head, int64_t block, const Few& work, const State& state) const {
    int64_t rows = group() * s.queries, width = sizes.value_width;
    HeadMask masks[kFewRows];
    int64_t first = INT64_MAX, limit = 0;
    for (int64_t g = 0; g < group(); g++) {
      masks[g] = HeadMask(p, s, kv_head * group() + g);
      first = at_most(first, masks[g].start(0)), limit = at_least(limit, masks[g].limit(s.queries - 1));
    }
    Queries queries{work.queries, masks, 0, s.queries, rows};
    pack_queries(work.queries, s, kv_head * group(), group(), 0, s.queries);
    Source<T> keys = keys_of_head(s, kv_head), all_values = values_of_head(s, kv_head);
    int64_t key = block * kBlockKeys, last = at_most(key + kBlockKeys, limit), ldv = width;
    auto meet_keys = [&](bool careful) {
      state.clear(rows, width);
      if (key + kBlockKeys <= first || last <= key) return;
      const float* values = work.values;
      bool values_in_place = !careful && rows <= kTileRows && pairs_as_they_are_read();
      if (plain_values(all_values)) {
        Slice<T> as_they_lie = all_values.rows(key, last, nullptr);
        values = reinterpret_cast<const float*>(as_they_lie.data), ldv = as_they_lie.step;
      } else if (!values_in_place) {
        pack_values(work.values, all_values, key, last, work.space);
      }
      auto with_values = [&](const Strip& strip, int64_t row, auto scores) {
#ifdef LLMKERN_QUADS
        if constexpr (kPairs<T>)
          if (values_in_place) {
            Runs runs;
            for (int64_t r = key; r < last; r += Runs::kRun)
              runs.rows[(r - key) / Runs::kRun] =
                  all_values.rows(r, at_most(r + Runs::kRun, last), work.values + (r - key) / 2 * width);
            auto sums = [&](const Span* spans, int span_count) {
              all_values_in_place(strip.n, work.tile.scores, runs, width, spans, span_count, last - key, state.output);
            };
            return meet<T>(p, strip, row, key, last - key, work.tile, state, scores, sums);
          }
#endif
        meet<T>(p, strip, row, key, last - key, work.tile, state, scores,
                packed_sums(sizes, strip, row, work.tile, state, values, ldv, careful, values != work.values));
      };
#ifdef LLMKERN_QUADS
      if (rows <= kTileRows) {
        Strip strip(queries, 0);
        int64_t spread = spread_units(sizes.depth);
        for (int64_t i = 0; i < rows; i++)
          spread_quads(work.keys + i * spread, queries.packed + i * sizes.depth, sizes.depth);
        // Past the last keys the values come next.
        auto ahead = [&](int64_t c) -> Slice<T> {
          const Source<T>& next = c < last ? keys : all_values;
          if (!next.in_runs()) return {reinterpret_cast<const T*>(work.keys), p.width};  // near already
          return next.run(c < last ? c : at_most(key + c - last, last - 1));
        };
        auto scores = [&](int64_t c, int count, float factor) {
          all_scores_in_place<kPairs<T>>(strip.n, work.keys, spread, keys.rows(key + c, key + c + count, work.space),
                                         count, p.width, work.tile.scores + c, factor,
                                         ahead(key + c + rows_ahead<T>(p.width)));
        };
        return with_values(strip, 0, scores);
      }
#endif
      if (rows > kTileRows) pack_keys(work.keys, keys, key, last, work.space);
      auto panel = [&](int64_t c) -> const float* {
        if (rows > kTileRows) return work.keys + c * sizes.depth;
        // Used once, a panel need not outlive that, and unseen ones are not read.
        pack_keys(work.keys, keys, key + c, at_most(key + c + kPanel, last), work.space);
        return work.keys;
      };
      for (int64_t row = 0; row < rows; row += kTileRows) {
        Strip strip(queries, row);
        with_values(strip, row, packed_scores(sizes, queries, strip, row, work.tile, panel));
      }
    };
    meet_keys(false);
    if (!finite(state, rows, width)) meet_keys(true);
  }

  void few_queries(int threads) const {
    int64_t most = group() * p.queries, width = sizes.value_width, kv_total = p.batch * p.kv_heads;
    int64_t state_units = round_up(State::units(most, width), 16);
    auto* memory =
        static_cast<float*>(scratch(Scratch::pack, static_cast<size_t>(4 * kv_total * sizes.blocks * state_units)));
    auto state_of = [&](int64_t task) {
      Memory m{memory + task * state_units};
      return State(m, most, width);
    };
    auto finish_head = [&](int64_t head, float* of_average) {
      Sequence s(p, head / p.kv_heads);
      int64_t kv_head = head % p.kv_heads;
      State total = state_of(head * sizes.blocks);
      auto of_values = average(of_average, s, kv_head);
      for (int64_t i = 0; i < group() * s.queries; i++) {
        for (int64_t block = 1; block < sizes.blocks; block++)
          total.merge(i, state_of(head * sizes.blocks + block), i, width);
        finish(p, sizes, total, i, s, kv_head * group() + i / s.queries, i % s.queries, of_values);
      }
    };
    Counter counter;
    auto body = [&](int, int) {
      Few work(*this, most);
      for (int64_t i = counter.take(); i < kv_total * sizes.blocks; i = counter.take()) {
        int64_t head = i / sizes.blocks;
        Sequence s(p, head / p.kv_heads);
        if (!s.queries) continue;
        attend_block(s, head % p.kv_heads, i % sizes.blocks, work, state_of(i));
        if (sizes.blocks == 1) finish_head(head, work.average);
      }
    };
    parallel(threads, body);
    if (sizes.blocks == 1) return;
    auto merge = [&](int thread, int count) {
      Few work(*this, most);
      Range heads = share(kv_total, 1, thread, count);
      for (int64_t head = heads.begin; head < heads.end; head++) finish_head(head, work.average);
    };
    parallel(kv_total * sizes.blocks * most * width < 65536 ? 1 : threads, merge);
  }
};

template <class T>
void forward(const AttentionParams& p) {
  if (p.batch * p.heads * p.queries == 0) return;
  Forward<T> run{p, Sizes<T>(p)};
  double size = static_cast<double>(p.batch * p.heads * p.queries) * static_cast<double>(p.keys * p.width);
  int threads = size < 65536 ? 1 : p.threads;
  if (run.group() * p.queries <= kFewRows)
    run.few_queries(threads);
  else
    run.many_queries(threads);
}

}  // namespace

void attention_forward(const AttentionParams& p) {
  switch (p.dtype) {
    case DType::bf16:
      return forward<Bf16>(p);
    case DType::f16:
      return forward<Fp16>(p);
    default:
      return forward<float>(p);
  }
}

}  // namespace llmkern::LLMKERN_ISA
