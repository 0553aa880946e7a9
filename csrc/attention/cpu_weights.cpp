// The attention weights themselves, (B, H, Sq, Sk), and their sums over the queries, from the log-sum-exp of the
// forward kernel; compiled once per instruction set.
#include "probabilities.h"

namespace llmkern::LLMKERN_ISA {
namespace {

template <class T>
void store_row(T* to, const float* from, int64_t count) {
  int64_t c = 0;
  for (; c + kWidth <= count; c += kWidth) store(to + c, load(from + c));
  if (c < count) store_first(to + c, load(from + c), static_cast<int>(count - c));
}

// The weights of (s, kv_head) in one block of keys, a strip of queries at a time: use(h, row, count, seen, weights)
// gets those of `count` queries from `row` on with the first `seen` keys of the block, kBlockKeys apart; no other is
// seen.
template <class T, class Use>
void for_strips(const AttentionParams& p, const Sizes<T>& sizes, const Sequence& s, int64_t kv_head, int64_t index,
                Use use) {
  Memory memory{static_cast<float*>(
      scratch(Scratch::work, static_cast<size_t>(4 * (sizes.block_units() + sizes.strip_units() + 1024))))};
  Block<T> block(sizes, memory.take(sizes.block_units()));
  Rows<T> query(memory, sizes.depth, sizes.width);
  float* weights = memory.take(kStrip * kBlockKeys);
  block.pack(p, sizes, s, kv_head, index);
  int64_t begin = index * kBlockKeys, keys = at_most(kBlockKeys, p.keys - begin), group = p.heads / p.kv_heads;
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; h++) {
    HeadMask mask(p, s, h);
    for (int64_t row = 0; row < p.queries; row += kStrip) {
      int count = static_cast<int>(at_most(kStrip, p.queries - row));
      int seen = static_cast<int>(at_least(0, at_most(keys, mask.limit(row + count - 1) - begin)));
      if (mask.start(row) >= begin + seen) seen = 0;
      if (seen) {
        query.pack(queries_of<T>(p.query, s, h) + row * p.query.row, p.query.row, count, p.width);
        probabilities(p, sizes, mask, block, query, p.logsumexp + s.row(p, h), row, count, begin, seen, weights);
      }
      use(h, row, count, seen, weights);
    }
  }
}

// Of every key, for a row that sees none.
float weight_of_empty_row(const AttentionParams& p) {
  return p.uniform_empty_rows && !p.sink ? 1.0f / static_cast<float>(p.keys) : 0;
}

template <class T>
void write_weights(const AttentionParams& p, const Sizes<T>& sizes, const Sequence& s, int64_t kv_head, int64_t index) {
  int64_t begin = index * kBlockKeys, keys = at_most(kBlockKeys, p.keys - begin);
  alignas(64) float empty[kBlockKeys];
  for (float& x : empty) x = weight_of_empty_row(p);
  for_strips(p, sizes, s, kv_head, index, [&](int64_t h, int64_t row, int count, int seen, float* weights) {
    for (int i = 0; i < count; i++) {
      float* from = weights + i * kBlockKeys;
      for (int c = static_cast<int>(round_up(seen, kWidth)); c < keys; c += kWidth) store(from + c, zero());
      if (p.logsumexp[s.row(p, h) + row + i] == minus_infinity()) from = empty;
      T* to = const_cast<T*>(queries_of<T>(p.weights, s, h)) + (row + i) * p.weights.row + begin;
      store_row(to, from, keys);
    }
  });
}

// The sums of a strip in float, over the strips in double: a key may be seen by very many queries.
template <class T>
void write_column_sums(const AttentionParams& p, const Sizes<T>& sizes, const Sequence& s, int64_t kv_head,
                       int64_t index) {
  int64_t begin = index * kBlockKeys, keys = at_most(kBlockKeys, p.keys - begin);
  double sums[kBlockKeys];
  for_strips(p, sizes, s, kv_head, index, [&](int64_t h, int64_t row, int count, int seen, const float* weights) {
    if (row == 0) std::memset(sums, 0, sizeof sums);
    alignas(64) float of_strip[kWidth];
    for (int c = 0; c < seen; c += kWidth) {
      Float sum = zero();
      for (int i = 0; i < count; i++) sum = add(sum, load(weights + i * kBlockKeys + c));
      store(of_strip, sum);
      for (int i = 0; i < kWidth; i++) sums[c + i] += static_cast<double>(of_strip[i]);
    }
    if (row + count < p.queries) return;
    double empty = 0;
    if (weight_of_empty_row(p) != 0)
      for (int64_t i = 0; i < p.queries; i++)
        empty += p.logsumexp[s.row(p, h) + i] == minus_infinity() ? static_cast<double>(weight_of_empty_row(p)) : 0;
    float* to = p.column_sums + (s.b * p.heads + h) * p.keys + begin;
    for (int64_t c = 0; c < keys; c++) to[c] = static_cast<float>(sums[c] + empty);
  });
}

template <class T>
void run(const AttentionParams& p) {
  if (p.queries == 0) return;
  Sizes<T> sizes(p);
  Counter counter;
  auto body = [&](int, int) {
    for (int64_t i = counter.take(); i < p.batch * p.kv_heads * sizes.blocks; i = counter.take()) {
      Sequence s(p, i / sizes.blocks / p.kv_heads);
      int64_t kv_head = i / sizes.blocks % p.kv_heads, index = i % sizes.blocks;
      if (p.column_sums)
        write_column_sums(p, sizes, s, kv_head, index);
      else
        write_weights(p, sizes, s, kv_head, index);
    }
  };
  double size = static_cast<double>(p.batch * p.heads * p.queries) * static_cast<double>(p.keys * p.width);
  parallel(size < 65536 ? 1 : p.threads, body);
}

}  // namespace

void attention_weights(const AttentionParams& p) {
  switch (p.dtype) {
    case DType::bf16:
      return run<Bf16>(p);
    case DType::f16:
      return run<Fp16>(p);
    default:
      return run<float>(p);
  }
}

}  // namespace llmkern::LLMKERN_ISA
