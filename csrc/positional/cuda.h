// The CUDA launchers of the positional kernels. Each returns when the kernel is queued on `stream` (a cudaStream_t) of
// `device`, and throws std::runtime_error where the launch fails.
#pragma once
#include "params.h"

namespace llmkern {

void sinusoidal_add_cuda(const SinusoidalAddParams& p, int device, void* stream);
void rotary_cuda(const RotaryParams& p, int device, void* stream);

}  // namespace llmkern
