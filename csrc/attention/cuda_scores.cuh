// What stands between the scores and the softmax, on the registers of a warp: scores of 16 queries by 8 keys as
// mma.sync leaves them, lane l with the keys 2 (l % 4) + {0, 1} of the queries l / 4 and l / 4 + 8.
#pragma once
#include "../common/mma.cuh"
#include "../common/philox.cuh"
#include "key_limits.h"

namespace llmkern::device {
namespace {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

LLMKERN_DEVICE float minus_infinity() { return bits_to_float(0xff800000u); }

// Absolute error near 2^-23: scores are added to others of their size.
LLMKERN_DEVICE float tanh_quick(float x) { return 1 - 2 / (exp2_quick(2 * kLog2e * x) + 1); }

// What the dense mask adds to a score, by its elements: bool, or a floating type.
LLMKERN_DEVICE float added_by(bool x) { return x ? 0 : minus_infinity(); }
template <class M>
LLMKERN_DEVICE float added_by(M x) {
  return widen(x);
}

// The rules of one (b, h), in a sequence of so many queries.
struct HeadRules {
  KeyLimits<int> limits;
  int queries;
  uint32_t head;  // for dropout
  uint64_t seed;
};

LLMKERN_DEVICE HeadRules head_rules(const AttentionParams& p, uint64_t seed, int b, int h) {
  return {narrow_limits(key_limits(p.mask, b, p.queries, p.keys)), static_cast<int>(p.queries),
          static_cast<uint32_t>(b * p.heads + h), seed};
}

// One score by the rules before the limits, but for the dense mask.
LLMKERN_DEVICE float bend_score(const AttentionParams& p, float x, float slope, float distance) {
  x *= p.scale;
  if (p.softcap != 0) x = p.softcap * tanh_quick(x / p.softcap);
  if (p.alibi) x = fmaf(-slope, fabsf(distance), x);
  return x;
}
LLMKERN_DEVICE float slope_of(const AttentionParams& p, int b, int h) {
  return p.alibi ? p.alibi[b * p.alibi_b + h * p.alibi_h] : 0;
}

// Adds the dense mask to scores, where the limits leave the key to the query.
template <class M, int kCount, int kEach>
LLMKERN_DEVICE void add_mask(const AttentionMask& m, const M* data, float (*s)[4], int first, int from, int to) {
#pragma unroll
  for (int n = 0; n < kCount; n++)
#pragma unroll
    for (int e = 0; e < kEach; e++)
      if (from <= 8 * n + e && 8 * n + e < to) {
        float added = added_by(data[(8 * n + e) * m.key]);
        s[n][first + e] = added == minus_infinity() ? added : s[n][first + e] + added;
      }
}

// The scores of a query and of the keys `key` + 8 n + {0, 1}: s[n][first], s[n][first + 1], by all rules but the
// limits. T: the dtype of the query, one of those that a mask may have. kEach 1: s[n][first] alone.
template <class T, int kCount, int kEach = 2>
LLMKERN_DEVICE void bend_scores(const AttentionParams& p, const HeadRules& rules, float (*s)[4], int first, int b,
                                int h, int row, int key) {
  float slope = slope_of(p, b, h), distance = static_cast<float>(row + rules.limits.diagonal - key);
#pragma unroll
  for (int n = 0; n < kCount; n++)
#pragma unroll
    for (int e = 0; e < kEach; e++)
      s[n][first + e] = bend_score(p, s[n][first + e], slope, distance - static_cast<float>(8 * n + e));
  const AttentionMask& m = p.mask;
  if (!m.data || row >= rules.queries) return;
  int from = key_start(rules.limits, row) - key, to = key_limit(rules.limits, row) - key;
  int64_t offset = b * m.b + h * m.h + row * m.row + key * m.key;
  if (m.dtype == DType::boolean)
    add_mask<bool, kCount, kEach>(m, reinterpret_cast<const bool*>(m.data) + offset, s, first, from, to);
  else if (m.dtype == DType::f32)
    add_mask<float, kCount, kEach>(m, reinterpret_cast<const float*>(m.data) + offset, s, first, from, to);
  else
    add_mask<T, kCount, kEach>(m, reinterpret_cast<const T*>(m.data) + offset, s, first, from, to);
}

// Sets the scores of the keys outside of the query's limits to -infinity.
template <int kCount>
LLMKERN_DEVICE void limit_scores(const KeyLimits<int>& limits, float (*s)[4], int first, int row, int key) {
  int from = key_start(limits, row) - key, to = key_limit(limits, row) - key;
#pragma unroll
  for (int n = 0; n < kCount; n++)
#pragma unroll
    for (int e = 0; e < 2; e++)
      if (8 * n + e < from || 8 * n + e >= to) s[n][first + e] = minus_infinity();
}

// Which of the weights of a query and the keys from `key` on, a multiple of 4, are kept: the bits 0 to 3.
LLMKERN_DEVICE uint32_t kept_weights(const AttentionParams& p, const HeadRules& rules, int row, int key) {
  uint32_t words[4], kept = 0;
  philox(rules.seed, static_cast<uint32_t>(key / 4), static_cast<uint32_t>(row), rules.head, 0, words);
#pragma unroll
  for (int j = 0; j < 4; j++) kept |= (words[j] >= p.drop_below ? 1u : 0u) << j;
  return kept;
}

// Sets the weights that are dropped to 0. s[n][0] is of query `row` and key `key` + 8 n. Two neighbouring lanes have
// the same four keys, and each finds out about one of the two rows.
template <int kCount>
LLMKERN_DEVICE void drop_weights(const AttentionParams& p, const HeadRules& rules, float (*s)[4], int row, int key) {
  int odd = static_cast<int>(threadIdx.x % 2);
#pragma unroll
  for (int n = 0; n < kCount; n++) {
    uint32_t mine = kept_weights(p, rules, row + 8 * odd, key + 8 * n);
    uint32_t theirs = __shfl_xor_sync(0xffffffffu, mine, 1);
    uint32_t upper = (odd ? theirs : mine) >> 2 * odd, lower = (odd ? mine : theirs) >> 2 * odd;
    s[n][0] = upper & 1 ? s[n][0] : 0, s[n][1] = upper & 2 ? s[n][1] : 0;
    s[n][2] = lower & 1 ? s[n][2] : 0, s[n][3] = lower & 2 ? s[n][3] : 0;
  }
}

}  // namespace
}  // namespace llmkern::device
