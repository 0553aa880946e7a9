// The attention forward for Hopper (compute capability 9.0), by wgmma and TMA. docs/attention_sm90.md tells how it
// works.
#pragma once
#include "cuda.h"

namespace llmkern {

// Why this kernel cannot serve a call, in a sentence; null where it can. Pointers that are null are not looked at, so
// that a call can be judged before its tensors are there.
#ifdef LLMKERN_SM90
const char* attention_forward_sm90_unsupported(const AttentionParams& p);
#else
inline const char* attention_forward_sm90_unsupported(const AttentionParams&) {
  return "the library was built without the kernels for Hopper: they need an nvcc that knows sm_90a, and 90 among "
         "LLMKERN_CUDA_ARCHS";
}
#endif

// Writes p.output and, unless it is null, p.logsumexp. Returns when the kernel is queued on `stream` (a cudaStream_t)
// of `device`, whose compute capability is 9.0. Allocates nothing and waits for nothing. Throws std::runtime_error
// where the call is unsupported, the driver too old or the launch fails.
#ifdef LLMKERN_SM90
void attention_forward_sm90(const AttentionParams& p, int device, void* stream);
#endif

// The forward on a device of compute capability 9.0: by this kernel where it can serve the call, or by mma.sync.
inline void attention_forward_hopper(const AttentionParams& p, int device, void* stream) {
#ifdef LLMKERN_SM90
  if (!attention_forward_sm90_unsupported(p)) return attention_forward_sm90(p, device, stream);
#endif
  attention_forward_cuda(p, device, stream);
}

}  // namespace llmkern
