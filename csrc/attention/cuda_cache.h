// The launcher of what writes new keys and values into a cache on CUDA. It returns when the kernel is queued on
// `stream` (a cudaStream_t) of `device`, and throws std::runtime_error where the launch fails.
#pragma once
#include "params.h"

namespace llmkern {

// Tokens and pages outside the cache are not written, and what is rotated to a position outside the tables becomes NaN.
void cache_cuda(const CacheParams& p, int device, void* stream);

}  // namespace llmkern
