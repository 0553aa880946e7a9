// Attention for the CPU, forward; compiled once per instruction set. docs/attention.md describes the algorithm,
// online.h its step.
//
// Two ways through the same steps. Many queries: the keys of a head are packed once, and blocks of queries go through
// them. Few queries (decoding): each split of the keys is packed block by block, met by all queries of the heads that
// share it, and the splits are merged at the end.
#include "../common/parallel.h"
#include "online.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int64_t kFewRows = 64;  // queries that share a key head, up to which its keys are read once

template <class T>
struct Forward {
  const AttentionParams& p;
  Sizes<T> sizes;

  int64_t group() const { return p.heads / p.kv_heads; }

  void pack_keys(float* keys, int64_t b, int64_t kv_head, int64_t begin, int64_t end) const {
    pack_panels<kPairs<T>>(keys, rows_of<T>(p.key, b, kv_head) + begin * p.key.row, p.key.row, 0, end - begin, p.width,
                           sizes.depth);
  }
  void pack_values(float* values, int64_t b, int64_t kv_head, int64_t begin, int64_t end) const {
    pack_rows<kPairs<T>>(values, rows_of<T>(p.value, b, kv_head) + begin * p.value.row, p.value.row, 0, end - begin,
                         p.value_width, sizes.value_width);
  }
  // Queries [begin, begin + count) of the heads [h, h + heads) into rows.
  void pack_queries(float* to, int64_t b, int64_t h, int64_t heads, int64_t begin, int64_t count) const {
    for (int64_t head = h; head < h + heads; head++) {
      const T* from = rows_of<T>(p.query, b, head) + begin * p.query.row;
      for (int64_t i = 0; i < count; i++, to += sizes.depth)
        pack_row<kPairs<T>>(to, from + i * p.query.row, p.width, sizes.depth);
    }
  }
  // The average of all values, made when it is asked for first.
  auto average(float* to, int64_t b, int64_t kv_head) const {
    return [this, to, b, kv_head, made = false]() mutable -> const float* {
      if (made) return to;
      made = true;
      std::memset(to, 0, static_cast<size_t>(4 * sizes.value_width));
      const T* values = rows_of<T>(p.value, b, kv_head);
      for (int64_t k = 0; k < p.keys; k++)
        for (int64_t d = 0; d < p.value_width; d++) to[d] += load_one(values + k * p.value.row + d);
      for (int64_t d = 0; d < p.value_width; d++) to[d] /= static_cast<float>(p.keys);
      return to;
    };
  }

  // --- many queries
  int64_t block_units() const { return round_up(sizes.key_units() + sizes.value_units(), 16); }

  void pack_block(float* to, int64_t b, int64_t kv_head, int64_t block) const {
    int64_t begin = block * kBlockKeys, end = at_most(begin + kBlockKeys, p.keys);
    pack_keys(to, b, kv_head, begin, end);
    pack_values(to + sizes.key_units(), b, kv_head, begin, end);
  }

  struct Work {
    explicit Work(const Sizes<T>& sizes)
        : memory{static_cast<float*>(scratch(
              Scratch::work, static_cast<size_t>(4 * (kBlockQueries * sizes.depth + Tile::kUnits + sizes.value_width +
                                                      64 + 2 * State::units(kBlockQueries, sizes.value_width)))))},
          queries(memory.take(kBlockQueries * sizes.depth)),
          tile(memory),
          state(memory, kBlockQueries, sizes.value_width),
          total(memory, kBlockQueries, sizes.value_width),
          average(memory.take(sizes.value_width)) {}
    Memory memory;
    float* queries;
    Tile tile;
    State state, total;
    float* average;
  };

  // A block of queries of (b, h) from `begin` on, with the packed blocks of its keys.
  void attend(const float* blocks, int64_t b, int64_t h, int64_t begin, const Work& work) const {
    HeadMask mask(p, b, h);
    int64_t rows = at_most(kBlockQueries, p.queries - begin), width = sizes.value_width;
    Queries queries{work.queries, &mask, begin, rows, rows};
    pack_queries(work.queries, b, h, 1, begin, rows);
    int64_t first = mask.start(begin), limit = mask.limit(begin + rows - 1);
    auto through_the_keys = [&](bool careful) -> const State& {
      work.state.clear(rows, width);
      if (sizes.splits > 1) work.total.clear(rows, width);
      for (int64_t split = first / kSplitKeys * kSplitKeys; split < limit; split += kSplitKeys) {
        int64_t end = at_most(split + kSplitKeys, limit);
        for (int64_t key = at_least(split, first / kBlockKeys * kBlockKeys); key < end; key += kBlockKeys) {
          const float* block = blocks + key / kBlockKeys * block_units();
          auto panel = [&](int64_t c) { return block + c * sizes.depth; };
          for (int64_t row = 0; row < rows; row += kTileRows)
            meet<T>(p, sizes, queries, Strip(queries, row), row, key, at_most(kBlockKeys, p.keys - key), panel,
                    block + sizes.key_units(), width, work.tile, work.state, careful);
        }
        if (sizes.splits == 1) break;
        for (int64_t i = 0; i < rows; i++) work.total.merge(i, work.state, i, width);
        if (end < limit) work.state.clear(rows, width);
      }
      return sizes.splits > 1 ? work.total : work.state;
    };
    const State* state = &through_the_keys(false);
    if (!finite(*state, rows, width)) state = &through_the_keys(true);
    auto of_values = average(work.average, b, h / group());
    for (int64_t i = 0; i < rows; i++) finish(p, sizes, *state, i, b, h, begin + i, of_values);
  }

  void many_queries(int threads) const {
    int64_t kv_total = p.batch * p.kv_heads, query_blocks = (p.queries + kBlockQueries - 1) / kBlockQueries;
    int64_t head_units = sizes.blocks * block_units();
    Counter counter;
    if (kv_total % threads == 0 || kv_total >= 8 * threads) {
      // Enough heads for all threads: each packs a head when it comes to it, while it is warm in its cache.
      auto body = [&](int, int) {
        auto* blocks = static_cast<float*>(scratch(Scratch::pack, static_cast<size_t>(4 * head_units)));
        Work work(sizes);
        for (int64_t i = counter.take(); i < kv_total; i = counter.take()) {
          int64_t b = i / p.kv_heads, kv_head = i % p.kv_heads;
          for (int64_t block = 0; block < sizes.blocks; block++)
            pack_block(blocks + block * block_units(), b, kv_head, block);
          for (int64_t h = kv_head * group(); h < (kv_head + 1) * group(); h++)
            for (int64_t q = 0; q < query_blocks; q++) attend(blocks, b, h, q * kBlockQueries, work);
        }
      };
      return parallel(threads, body);
    }
    auto* packed = static_cast<float*>(scratch(Scratch::pack, static_cast<size_t>(4 * kv_total * head_units)));
    auto pack = [&](int, int) {
      for (int64_t i = counter.take(); i < kv_total * sizes.blocks; i = counter.take()) {
        int64_t head = i / sizes.blocks;
        pack_block(packed + i * block_units(), head / p.kv_heads, head % p.kv_heads, i % sizes.blocks);
      }
    };
    parallel(threads, pack);
    counter.next = 0;
    auto body = [&](int, int) {
      Work work(sizes);
      for (int64_t i = counter.take(); i < p.batch * p.heads * query_blocks; i = counter.take()) {
        // The last blocks first: with a causal mask they are the longest.
        int64_t q = query_blocks - 1 - i / (p.batch * p.heads), head = i % (p.batch * p.heads);
        int64_t b = head / p.heads, h = head % p.heads;
        attend(packed + (b * p.kv_heads + h / group()) * head_units, b, h, q * kBlockQueries, work);
      }
    };
    parallel(threads, body);
  }

  // --- few queries
  // Whether values need no packing: whole vectors of floats as they lie.
  bool plain_values() const { return std::is_same<T, float>::value && p.value_width % kWidth == 0; }

  struct Split {
    Split(const Sizes<T>& sizes, int64_t rows)
        : memory{static_cast<float*>(scratch(
              Scratch::work, static_cast<size_t>(4 * (rows * sizes.depth + sizes.key_units() + sizes.value_units() +
                                                      Tile::kUnits + sizes.value_width + 96))))},
          queries(memory.take(rows * sizes.depth)),
          keys(memory.take(sizes.key_units())),
          values(memory.take(sizes.value_units())),
          tile(memory),
          average(memory.take(sizes.value_width)) {}
    Memory memory;
    float *queries, *keys, *values;
    Tile tile;
    float* average;
  };

  // All queries of the heads that share kv_head meet the keys of one split.
  void attend_split(int64_t b, int64_t kv_head, int64_t split, const Split& work, const State& state) const {
    int64_t rows = group() * p.queries, width = sizes.value_width;
    HeadMask masks[kFewRows];
    int64_t first = INT64_MAX, limit = 0;
    for (int64_t g = 0; g < group(); g++) {
      masks[g] = HeadMask(p, b, kv_head * group() + g);
      first = at_most(first, masks[g].start(0)), limit = at_least(limit, masks[g].limit(p.queries - 1));
    }
    Queries queries{work.queries, masks, 0, p.queries, rows};
    pack_queries(work.queries, b, kv_head * group(), group(), 0, p.queries);
    int64_t end = at_most((split + 1) * kSplitKeys, limit);
    auto through_the_keys = [&](bool careful) {
      state.clear(rows, width);
      for (int64_t key = at_least(split * kSplitKeys, first / kBlockKeys * kBlockKeys); key < end; key += kBlockKeys) {
        int64_t last = at_most(key + kBlockKeys, end), ldv = width;
        const float* values = work.values;
        if (plain_values())
          values = reinterpret_cast<const float*>(rows_of<T>(p.value, b, kv_head) + key * p.value.row),
          ldv = p.value.row;
        else
          pack_values(work.values, b, kv_head, key, last);
        if (rows <= kTileRows) {  // each panel is used once: it need not outlive that, and unseen ones are not read
          auto panel = [&](int64_t c) -> const float* {
            pack_keys(work.keys, b, kv_head, key + c, at_most(key + c + kPanel, last));
            return work.keys;
          };
          meet<T>(p, sizes, queries, Strip(queries, 0), 0, key, last - key, panel, values, ldv, work.tile, state,
                  careful);
          continue;
        }
        pack_keys(work.keys, b, kv_head, key, last);
        auto panel = [&](int64_t c) { return work.keys + c * sizes.depth; };
        for (int64_t row = 0; row < rows; row += kTileRows)
          meet<T>(p, sizes, queries, Strip(queries, row), row, key, last - key, panel, values, ldv, work.tile, state,
                  careful);
      }
    };
    through_the_keys(false);
    if (!finite(state, rows, width)) through_the_keys(true);
  }

  void few_queries(int threads) const {
    int64_t rows = group() * p.queries, width = sizes.value_width, kv_total = p.batch * p.kv_heads;
    int64_t state_units = round_up(State::units(rows, width), 16);
    auto* memory =
        static_cast<float*>(scratch(Scratch::pack, static_cast<size_t>(4 * kv_total * sizes.splits * state_units)));
    auto state_of = [&](int64_t task) {
      Memory m{memory + task * state_units};
      return State(m, rows, width);
    };
    auto finish_head = [&](int64_t head, float* of_average) {
      int64_t b = head / p.kv_heads, kv_head = head % p.kv_heads;
      State total = state_of(head * sizes.splits);
      auto of_values = average(of_average, b, kv_head);
      for (int64_t i = 0; i < rows; i++) {
        for (int64_t split = 1; split < sizes.splits; split++)
          total.merge(i, state_of(head * sizes.splits + split), i, width);
        finish(p, sizes, total, i, b, kv_head * group() + i / p.queries, i % p.queries, of_values);
      }
    };
    Counter counter;
    auto body = [&](int, int) {
      Split work(sizes, rows);
      for (int64_t i = counter.take(); i < kv_total * sizes.splits; i = counter.take()) {
        int64_t head = i / sizes.splits;
        attend_split(head / p.kv_heads, head % p.kv_heads, i % sizes.splits, work, state_of(i));
        if (sizes.splits == 1) finish_head(head, work.average);
      }
    };
    parallel(threads, body);
    if (sizes.splits == 1) return;
    auto merge = [&](int thread, int count) {
      Split work(sizes, rows);
      Range heads = share(kv_total, 1, thread, count);
      for (int64_t head = heads.begin; head < heads.end; head++) finish_head(head, work.average);
    };
    parallel(kv_total * sizes.splits * rows * width < 65536 ? 1 : threads, merge);
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
