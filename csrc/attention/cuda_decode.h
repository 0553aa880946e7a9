// The launcher of the attention of few queries to many keys on CUDA. It returns when the kernels are queued on `stream`
// (a cudaStream_t) of `device`, and throws std::runtime_error where a launch fails.
#pragma once
#include "params.h"

namespace llmkern {

// Each sequence's keys are cut into `splits` pieces, 1 to 128, each a block's work. With more than one piece,
// `workspace` is memory on the device of B * H * Sq * splits * (Dv + 2) + 7 floats, at a multiple of 32 bytes, which
// nobody needs to have written; else it may be null. Heads (D, Dv) of 1 to 256; bf16 and fp16, the keys and values of
// the same dtype or int8 with scales; neither a dense mask, dropout, bounds nor uniform_empty_rows; fewer than 2^30
// keys.
void attention_decode_cuda(const AttentionParams& p, float* workspace, int splits, int device, void* stream);

}  // namespace llmkern
