// The CUDA launchers of the attention kernels. Each returns when the kernel is queued on `stream` (a cudaStream_t) of
// `device`, and throws std::runtime_error where the launch fails. Nothing is allocated, and nobody waits. The fields of
// the arguments that are pointers point to memory of the device, but for `seed`, which is read here.
#pragma once
#include "params.h"

namespace llmkern {

// How a kernel is to be launched, and which of those in its file it is.
struct AttentionLaunch {
  int width;      // that shared memory has room for: 64 or 128
  int row_tiles;  // of 16 queries, a warp's
  bool features;  // rules beyond limits, dropout, a scale that is not positive
  int64_t blocks;
  int threads, shared_bytes;
};
// What the blocks of the forward are told besides.
struct AttentionForwardWork {
  uint32_t row_blocks;  // of each head
  float factor;         // e^(scale * score - m) is 2^(factor * score - ...)
  uint64_t seed;        // of the dropout, by value: a copy to the device could not be part of a CUDA graph
  // Whether pieces of 8 elements lie at multiples of 16 bytes.
  bool query_aligned, key_aligned, value_aligned, output_aligned;
};
// The forward by mma.sync (cuda_forward.cu): bf16 and fp16, D and Dv up to 128.
AttentionLaunch attention_forward_launch(const AttentionParams& p);
AttentionForwardWork attention_forward_work(const AttentionParams& p, const AttentionLaunch& l);
void attention_forward_cuda(const AttentionParams& p, int device, void* stream);

}  // namespace llmkern
