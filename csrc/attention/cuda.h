// The CUDA launchers of the attention kernels. Each returns when the kernel is queued on `stream` (a cudaStream_t) of
// `device`, and throws std::runtime_error where the launch fails. Nothing is allocated, and nobody waits. The fields of
// the arguments that are pointers point to memory of the device, but for `seed`, which is read here.
#pragma once
#include "params.h"

namespace llmkern {

// The forward by mma.sync (cuda_forward.cu): bf16 and fp16, D and Dv up to 128.
void attention_forward_cuda(const AttentionParams& p, int device, void* stream);

}  // namespace llmkern
