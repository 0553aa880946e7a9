// Arguments of the attention kernels. Strides count elements; the last dimension of every tensor of (b, h, row, d)
// is contiguous.
#pragma once
#include <cstdint>

#include "../common/types.h"

namespace llmkern {

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
  int64_t lengths_step;
  // Key j is seen by query i from i + diagonal - left to i + diagonal + right, where the diagonal is 0 or, with
  // bottom_right, the number of keys less that of queries. Causal is right = 0.
  int64_t left, right;
  bool bottom_right;
};
// What left and right are where that side is open.
constexpr int64_t kUnbounded = int64_t{1} << 48;

struct AttentionParams {
  AttentionTensor query, key, value, output;  // (B, H, Sq, D), (B, Hkv, Sk, D), (B, Hkv, Sk, Dv), (B, H, Sq, Dv)
  AttentionTensor grad_output, dquery, dkey, dvalue;
  AttentionTensor weights;  // (B, H, Sq, Sk): of the weights kernels, what they write; backward, the gradient
  double* logsumexp;        // (B, H, Sq) contiguous
  float* grad_scores;       // (B, H, Sq, Sk) contiguous, zeroed; null: not asked for
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
  bool uniform_empty_rows;
  DType dtype;
  int threads;
};

}  // namespace llmkern
