// Attention for the CPU, forward: blocks of keys with an online softmax; compiled once per instruction set.
// docs/attention.md describes the algorithm.
#include "../common/parallel.h"
#include "mask.h"
#include "tile.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int kBlockKeys = 256;  // a row's sums are cut here and nowhere else, so that no result depends on other rows
constexpr int kBlockQueries = 96;

// Sizes of the packed forms, in units of 32 bits.
template <class T>
struct Sizes {
  explicit Sizes(const AttentionParams& p)
      : depth(kPairs<T> ? (p.width + 1) / 2 : p.width),
        value_width(round_up(p.value_width, kWidth)),
        key_units(round_up(p.keys, kPanel) * depth),
        value_units((kPairs<T> ? (p.keys + 1) / 2 : p.keys) * value_width),
        blocks((p.keys + kBlockKeys - 1) / kBlockKeys),
        head_units(round_up(key_units + value_units, 16) + round_up(blocks, 64) / 4) {}
  int64_t depth, value_width, key_units, value_units, blocks, head_units;
};

// The packed keys and values of one (b, kv head), and for each block whether its values are all finite.
template <class T>
struct Head {
  Head(const Sizes<T>& sizes, float* memory)
      : keys(memory),
        values(memory + sizes.key_units),
        special(reinterpret_cast<uint8_t*>(memory + round_up(sizes.key_units + sizes.value_units, 16))) {}
  float *keys, *values;
  uint8_t* special;

  void pack_block(const AttentionParams& p, const Sizes<T>& sizes, int64_t b, int64_t h, int64_t block) {
    int64_t begin = block * kBlockKeys, end = at_most(begin + kBlockKeys, p.keys);
    pack_panels<kPairs<T>>(keys, rows_of<T>(p.key, b, h), p.key.row, begin, end, p.width, sizes.depth);
    special[block] = pack_rows<kPairs<T>>(values, rows_of<T>(p.value, b, h), p.value.row, begin, end, p.value_width,
                                          sizes.value_width);
  }
};

// What one thread works in.
struct Work {
  Work(int64_t depth, int64_t value_width) {
    int64_t units = kBlockQueries * (depth + value_width + 3) + 2 * kTileRows * kBlockKeys + value_width + 128;
    query = static_cast<float*>(scratch(Scratch::work, static_cast<size_t>(4 * units)));
    output = query + round_up(kBlockQueries * depth, 16);
    scores = output + kBlockQueries * value_width;
    weights = scores + kTileRows * kBlockKeys;
    largest = weights + kTileRows * kBlockKeys;
    sum = largest + kBlockQueries;
    average = sum + kBlockQueries;
  }
  float *query, *output, *scores, *weights, *largest, *sum, *average;
};

// The scores of one query in a block become weights relative to the largest so far; returns the factor that what was
// summed before must be multiplied by.
template <class T>
LLMKERN_INLINE float soften(float* s, float* weights, int count, float* largest_so_far, float* sum_so_far) {
  Float m0 = broadcast(minus_infinity()), m1 = m0;
  int c = 0;
  for (; c + 2 * kWidth <= count; c += 2 * kWidth) m0 = max(m0, load(s + c)), m1 = max(m1, load(s + c + kWidth));
  if (c < count) m0 = max(m0, load(s + c));
  float before = *largest_so_far, now = largest(max(m0, m1));
  now = before > now ? before : now;
  *largest_so_far = now;
  // Nothing seen yet: any finite value, so that e^(-infinity - it) is 0.
  float shift = now == minus_infinity() ? 0 : now;
  Float by = broadcast(shift), sum0 = zero(), sum1 = zero();
  auto weight = [&](int at) {
    Float w = exp_negative<kPairs<T>>(sub(load(s + at), by));
    if constexpr (kPairs<T>)
      store_flushed(reinterpret_cast<Bf16*>(weights) + at, w);
    else
      store(weights + at, w);
    return w;
  };
  c = 0;
  for (; c + 2 * kWidth <= count; c += 2 * kWidth) {
    sum0 = add(sum0, weight(c));
    sum1 = add(sum1, weight(c + kWidth));
  }
  if (c < count) sum0 = add(sum0, weight(c));
  alignas(64) float factor[kWidth];
  store(factor, exp_negative(sub(broadcast(before), by)));
  float correction = before == now ? 1.0f : factor[0];
  *sum_so_far = *sum_so_far * correction + sum(add(sum0, sum1));
  return correction;
}

template <class T>
void average_values(const AttentionParams& p, int64_t b, int64_t kv_head, float* average, int64_t units) {
  std::memset(average, 0, static_cast<size_t>(4 * units));
  const T* values = rows_of<T>(p.value, b, kv_head);
  for (int64_t k = 0; k < p.keys; k++)
    for (int64_t d = 0; d < p.value_width; d++) average[d] += load_one(values + k * p.value.row + d);
  for (int64_t d = 0; d < p.value_width; d++) average[d] /= static_cast<float>(p.keys);
}

template <class T>
void attend(const AttentionParams& p, const Sizes<T>& sizes, const Head<T>& head, int64_t b, int64_t h, int64_t begin,
            const Work& work) {
  HeadMask mask(p, b, h);
  int rows = static_cast<int>(at_most(kBlockQueries, p.queries - begin));
  const T* query = rows_of<T>(p.query, b, h);
  for (int i = 0; i < rows; i++) {
    pack_row<kPairs<T>>(work.query + i * sizes.depth, query + (begin + i) * p.query.row, p.width, sizes.depth);
    work.largest[i] = minus_infinity();
    work.sum[i] = 0;
  }
  std::memset(work.output, 0, static_cast<size_t>(4 * rows * sizes.value_width));
  int64_t end = mask.limit(begin + rows - 1);
  for (int64_t key = 0; key < end; key += kBlockKeys) {
    for (int first_row = 0; first_row < rows; first_row += kTileRows) {
      int n = rows - first_row < kTileRows ? rows - first_row : kTileRows;
      int count = static_cast<int>(at_most(kBlockKeys, mask.limit(begin + first_row + n - 1) - key));
      if (count <= 0) continue;
      times_panels<kPairs<T>>(n, work.query + first_row * sizes.depth, sizes.depth, head.keys + key * sizes.depth,
                              sizes.depth, count, work.scores, kBlockKeys, p.scale);
      int padded = static_cast<int>(round_up(count, kWidth));
      float corrections[kTileRows];
      constexpr int64_t kRow = kPairs<T> ? kBlockKeys / 2 : kBlockKeys;
      for (int i = 0; i < n; i++) {
        int r = first_row + i;
        mask.apply(work.scores + i * kBlockKeys, begin + r, key, count);
        corrections[i] =
            soften<T>(work.scores + i * kBlockKeys, work.weights + i * kRow, padded, work.largest + r, work.sum + r);
      }
      times_rows<kPairs<T>, Into::correct>(
          n, work.weights, kRow, 1, head.values + (kPairs<T> ? key / 2 : key) * sizes.value_width, sizes.value_width,
          kPairs<T> ? (count + 1) / 2 : count, work.output + first_row * sizes.value_width, corrections,
          head.special[key / kBlockKeys]);
    }
  }
  bool averaged = false;
  T* output = const_cast<T*>(rows_of<T>(p.output, b, h));
  for (int i = 0; i < rows; i++) {
    float* from = work.output + i * sizes.value_width;
    float total = work.sum[i];
    if (work.largest[i] == minus_infinity() && total == 0) {  // every key is masked
      if (p.uniform_empty_rows && p.keys) {
        if (!averaged) average_values<T>(p, b, h / (p.heads / p.kv_heads), work.average, sizes.value_width);
        averaged = true;
        from = work.average;
      }
      total = 1;
    }
    T* to = output + (begin + i) * p.output.row;
    Float by = broadcast(total);
    int64_t d = 0;
    for (; d + kWidth <= p.value_width; d += kWidth) store(to + d, div(load(from + d), by));
    if (d < p.value_width) store_first(to + d, div(load(from + d), by), static_cast<int>(p.value_width - d));
    p.logsumexp[(b * p.heads + h) * p.queries + begin + i] =
        work.sum[i] == 0 ? -__builtin_inf()
                         : static_cast<double>(work.largest[i]) + __builtin_log(static_cast<double>(work.sum[i]));
  }
}

template <class T>
void forward(const AttentionParams& p) {
  if (p.batch * p.heads * p.queries == 0) return;
  Sizes<T> sizes(p);
  int64_t kv_total = p.batch * p.kv_heads, group = p.heads / p.kv_heads;
  int64_t query_blocks = (p.queries + kBlockQueries - 1) / kBlockQueries;
  double work_size = static_cast<double>(p.batch * p.heads * p.queries) * static_cast<double>(p.keys * p.width);
  int threads = work_size < 65536 ? 1 : p.threads;
  Counter counter;
  if (kv_total % threads == 0 || kv_total >= 8 * threads) {
    // Enough heads for all threads: each packs a head when it comes to it, while it is warm in its cache.
    auto body = [&](int, int) {
      Head<T> head(sizes, static_cast<float*>(scratch(Scratch::pack, static_cast<size_t>(4 * sizes.head_units))));
      Work work(sizes.depth, sizes.value_width);
      for (int64_t i = counter.take(); i < kv_total; i = counter.take()) {
        int64_t b = i / p.kv_heads, kv_head = i % p.kv_heads;
        for (int64_t block = 0; block < sizes.blocks; block++) head.pack_block(p, sizes, b, kv_head, block);
        for (int64_t h = kv_head * group; h < (kv_head + 1) * group; h++)
          for (int64_t q = 0; q < query_blocks; q++) attend<T>(p, sizes, head, b, h, q * kBlockQueries, work);
      }
    };
    return parallel(threads, body);
  }
  float* packed = static_cast<float*>(scratch(Scratch::pack, static_cast<size_t>(4 * kv_total * sizes.head_units)));
  auto pack = [&](int, int) {
    for (int64_t i = counter.take(); i < kv_total * sizes.blocks; i = counter.take()) {
      int64_t at = i / sizes.blocks;
      Head<T> head(sizes, packed + at * sizes.head_units);
      head.pack_block(p, sizes, at / p.kv_heads, at % p.kv_heads, i % sizes.blocks);
    }
  };
  parallel(threads, pack);
  counter.next = 0;
  auto body = [&](int, int) {
    Work work(sizes.depth, sizes.value_width);
    for (int64_t i = counter.take(); i < p.batch * p.heads * query_blocks; i = counter.take()) {
      int64_t at = i / query_blocks, b = at / p.heads, h = at % p.heads;
      Head<T> head(sizes, packed + (b * p.kv_heads + h / group) * sizes.head_units);
      // The last blocks first: with a causal mask they are the longest.
      attend<T>(p, sizes, head, b, h, (query_blocks - 1 - i % query_blocks) * kBlockQueries, work);
    }
  };
  parallel(threads, body);
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
