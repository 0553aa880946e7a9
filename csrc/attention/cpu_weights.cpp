// The attention weights themselves, (B, H, Sq, Sk), from the log-sum-exp of the forward kernel; compiled once per
// instruction set.
#include "probabilities.h"

namespace llmkern::LLMKERN_ISA {
namespace {

template <class T>
void store_row(T* to, const float* from, int64_t count) {
  int64_t c = 0;
  for (; c + kWidth <= count; c += kWidth) store(to + c, load(from + c));
  if (c < count) store_first(to + c, load(from + c), static_cast<int>(count - c));
}

// All queries of the heads of (s, kv_head) with one block of keys.
template <class T>
void weights_of_block(const AttentionParams& p, const Sizes<T>& sizes, const Sequence& s, int64_t kv_head,
                      int64_t index) {
  Memory memory{static_cast<float*>(scratch(
      Scratch::work, static_cast<size_t>(4 * (sizes.block_units() + sizes.strip_units() + kBlockKeys + 1024))))};
  Block<T> block(sizes, memory.take(sizes.block_units()));
  Rows<T> query(memory, sizes.depth, sizes.width);
  float* weights = memory.take(kStrip * kBlockKeys);
  float* empty = memory.take(kBlockKeys);
  block.pack(p, sizes, s, kv_head, index);
  int64_t begin = index * kBlockKeys, keys = at_most(kBlockKeys, p.keys - begin), group = p.heads / p.kv_heads;
  for (int c = 0; c < kBlockKeys; c++)
    empty[c] = p.uniform_empty_rows && !p.sink ? 1.0f / static_cast<float>(p.keys) : 0;
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; h++) {
    HeadMask mask(p, s, h);
    const double* logsumexp = p.logsumexp + s.row(p, h);
    for (int64_t row = 0; row < p.queries; row += kStrip) {
      int count = static_cast<int>(at_most(kStrip, p.queries - row));
      int seen = static_cast<int>(at_least(0, at_most(keys, mask.limit(row + count - 1) - begin)));
      if (seen) {
        query.pack(queries_of<T>(p.query, s, h) + row * p.query.row, p.query.row, count, p.width);
        probabilities(p, sizes, mask, block, query, logsumexp, row, count, begin, seen, weights);
      }
      for (int i = 0; i < count; i++) {
        float* from = weights + i * kBlockKeys;
        for (int c = static_cast<int>(round_up(seen, kWidth)); c < keys; c += kWidth) store(from + c, zero());
        if (logsumexp[row + i] == minus_infinity()) from = empty;
        T* to = const_cast<T*>(queries_of<T>(p.weights, s, h)) + (row + i) * p.weights.row + begin;
        store_row(to, from, keys);
      }
    }
  }
}

template <class T>
void run(const AttentionParams& p) {
  Sizes<T> sizes(p);
  Counter counter;
  auto body = [&](int, int) {
    for (int64_t i = counter.take(); i < p.batch * p.kv_heads * sizes.blocks; i = counter.take())
      weights_of_block(p, sizes, Sequence(p, i / sizes.blocks / p.kv_heads), i / sizes.blocks % p.kv_heads,
                       i % sizes.blocks);
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
