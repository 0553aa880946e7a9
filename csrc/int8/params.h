// Arguments of the int8 kernels. Strides count elements; the last dimension of every matrix is contiguous.
#pragma once
#include <cstdint>

#include "../common/types.h"

namespace llmkern {

// Weights in the order that int8_linear of the same instruction set reads; csrc/int8/cpu.cpp describes it.
struct Int8PackParams {
  const int8_t* weight;  // (outputs, depth)
  void* packed;          // 64-byte aligned; with null only `bytes` is set
  int64_t outputs, depth;
  int threads;
  int64_t* bytes;  // out: how much memory `packed` takes
};

// out[m, n] = (sum over k of (q[m, k] - zero[m]) * weight[n, k]) * (scale[m] * weight_scale[n]) + bias[n]
struct Int8LinearParams {
  const void* x;  // (rows, depth)
  const void* packed;
  const float* weight_scale;  // (outputs)
  const void* bias;           // (outputs) or null
  void* out;                  // (rows, outputs)
  int64_t rows, outputs, depth, x_stride, out_stride;
  DType dtype, bias_dtype;
  int threads;
  bool* accepted;  // out: false where another instruction set made `packed`, which is then not read
};

// The first half of int8_linear by itself, for tests: q * scale is x up to the zero point and the rounding.
struct QuantizeRowsParams {
  const void* x;  // (rows, depth)
  uint8_t* quantized;
  float* scale;   // (rows); NaN for a row with NaN or infinity
  int32_t* zero;  // (rows)
  int64_t rows, depth, x_stride;
  DType dtype;
};

}  // namespace llmkern
