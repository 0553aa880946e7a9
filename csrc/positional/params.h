// Arguments of the positional kernels, the same for the CPU and CUDA. Strides count elements.
#pragma once
#include <cstdint>

#include "../common/types.h"

namespace llmkern {

// out[s, b, d] = x[s, b, d] * scale + pe[s, d]: sequence first, the last dimension contiguous.
struct SinusoidalAddParams {
  const void* x;
  const float* pe;
  void* out;
  int64_t length, batch, width;
  int64_t x_stride_s, x_stride_b, pe_stride_s, out_stride_s, out_stride_b;
  float scale;
  DType dtype;
  int threads;
};

}  // namespace llmkern
