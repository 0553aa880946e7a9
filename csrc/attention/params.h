// Arguments of the attention kernels. Strides count elements; the last dimension of every tensor of (b, h, row, d)
// is contiguous.
#pragma once
#include <cstdint>

#include "../common/isa.h"
#include "../common/rotation.h"
#include "../common/types.h"

namespace llmkern {

// Number i of an array of int32 or int64.
LLMKERN_INLINE int64_t integer(const char* data, bool is_64, int64_t i) {
  return is_64 ? reinterpret_cast<const int64_t*>(data)[i] : reinterpret_cast<const int32_t*>(data)[i];
}

// Where the tensor of dimensions (b, h, row, d) begins, and the steps of its outer three.
struct AttentionTensor {
  char* data;
  int64_t b, h, row;
};

// Key j takes part for query i of (b, h) where each rule given lets it (llmkern/attention/mask.py).
struct AttentionMask {
  const char* data;  // null: none
  DType dtype;       // boolean: not 0 takes part; floating: added to the scaled scores, -infinity masks
  int64_t b, h, row, key;
  const char* lengths;  // null: none
  bool lengths_64;
  int64_t lengths_step, lengths_more;  // more: what is added to each length
  // Key j is seen by query i from i + diagonal - left to i + diagonal + right, where the diagonal is 0 or, with
  // bottom_right, the number of keys less that of queries. Causal is right = 0.
  int64_t left, right;
  bool bottom_right;
};
// What left and right are where that side is open.
constexpr int64_t kUnbounded = int64_t{1} << 48;

// Sequences that lie end to end: sequence b has the rows from bounds[b] to bounds[b + 1], which rise from 0 to `total`.
struct AttentionBounds {
  const char* data;  // null: none
  bool is_64;
  int64_t total;
};
// Row r of sequence b lies in row r % size of page table[b * step + r / size].
struct AttentionPages {
  const char* table;  // null: none
  bool is_64;
  int64_t step, size, count;
};
// What int8 elements of (b, h, row) are multiplied by.
struct AttentionScales {
  const float* data;  // null: the elements are not int8
  int64_t b, h, row;
};

struct AttentionParams {
  AttentionTensor query, key, value, output;  // (B, H, Sq, D), (B, Hkv, Sk, D), (B, Hkv, Sk, Dv), (B, H, Sq, Dv)
  AttentionTensor grad_output, dquery, dkey, dvalue;
  AttentionTensor weights;  // (B, H, Sq, Sk): of the weights kernels, what they write; backward, the gradient
  double* logsumexp;        // (B, H, Sq) contiguous, with query_bounds (H, total)
  // Each of these may be null: not given, or not asked for.
  const double* grad_logsumexp;  // as logsumexp
  float* grad_scores;            // (B, H, Sq, Sk) contiguous, zeroed
  float* row_sums;               // (B, H, Sq) contiguous, zeroed: of each row the sum of weight times gradient
  float* column_sums;            // (B, H, Sk) contiguous, zeroed: of the weights, over the queries
  AttentionMask mask;
  int64_t batch, heads, kv_heads, queries, keys, width, value_width;
  // In this order: scale * q k; softcap * tanh(score / softcap) unless 0; -slope * |i + diagonal - j| with the slopes
  // of (b, h); the mask; one more logit for each head that has no value, the sink; softmax; dropout of the weights.
  float scale, softcap;
  const float* alibi;  // null: none
  int64_t alibi_b, alibi_h;
  const float* sink;  // (H); null: none
  // A weight is dropped where word j % 4 of Philox4x32-10 under `seed` at (j / 4, i, b * H + h, 0) is below; 0: none.
  uint32_t drop_below;
  float keep_scale;
  const int64_t* seed;
  bool uniform_empty_rows;  // without a sink: a row with every key masked attends to all alike; else it is zeros
  DType dtype;
  int threads;
  // With bounds, queries and keys are those of the longest sequence, and the tensors' steps of b are 0. With pages, b
  // is the page of keys and values.
  AttentionBounds query_bounds, key_bounds;
  AttentionPages pages;
  AttentionScales key_scales, value_scales;
};

// How many tokens a cache holds of each sequence.
struct CacheLengths {
  const char* data;  // null: all that it has room for
  bool is_64;
  int64_t step;
};

// New keys and values go behind those that the cache holds, which `lengths` counts; with angles, the keys are rotated
// to the positions where they come to stand and the queries into `rotated`: where `ordered`, query i to the place of
// new key i, else all to that of the first.
struct CacheParams {
  AttentionTensor query, rotated;          // (B, H, Sq, D)
  AttentionTensor key, value;              // (B, Hkv, added, D), (B, Hkv, added, Dv)
  AttentionTensor key_cache, value_cache;  // (B or pages, Hkv, room, D), (.., Dv); int8 with scales, else of `dtype`
  float *key_scales, *value_scales;        // of (B or pages, Hkv, room); null: none
  int64_t key_scale_steps[3], value_scale_steps[3];
  AttentionPages pages;
  CacheLengths lengths;
  RotationTables rotation;  // without cos: none
  int64_t batch, heads, kv_heads, queries, added, capacity, width, value_width;
  DType dtype;
  bool ordered;
  int threads;
};

}  // namespace llmkern
