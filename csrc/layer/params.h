// Arguments of a decoder layer in one call. Strides count elements.
#pragma once
#include <cstdint>

#include "../attention/params.h"
#include "../common/types.h"
#include "../int8/params.h"

namespace llmkern {

// A linear layer with int8 weights, in the order of Int8LinearParams.
struct LayerLinear {
  const void* packed;
  const float* scale;
  const void* bias;  // or null
  int64_t outputs, depth;
  QuantizeParams quantize;
  DType bias_dtype;
};

// x + attention(norm(x)), and that + down(f(gate) * up) of its norm, with RMSNorms before both (a Llama block):
//   q, k, v = qkv(norm(x)); q and k are rotated by halves; k and v go behind the `past` rows that the caches hold.
struct DecoderLayerParams {
  const void *x, *attention_norm, *feed_norm;  // (batch, length, width) and (width) twice, all of `dtype`
  void* out;                                   // as x; both contiguous
  const void *cos, *sin;                       // (batch or 1, length, width of a head), each angle twice
  int64_t table_batch, table_row;              // steps of the tables; table_batch 0: the same for all
  char *keys, *values;                         // (batch, kv_heads, room, width of a head); null: no cache
  int64_t keys_b, keys_h, keys_row, values_b, values_h, values_row, past;
  const char* mask;  // boolean, true takes part; null: causal
  int64_t mask_b, mask_h, mask_row, mask_key;
  LayerLinear qkv, output, gate_up, down;
  Activation gate;  // swiglu or geglu
  int64_t batch, length, width, heads, kv_heads, head_width;
  float scale, attention_eps, feed_eps, attention_offset, feed_offset;
  DType dtype;
  int threads;
};

}  // namespace llmkern
