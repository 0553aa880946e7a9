// Arguments of the gated activations. Strides count elements from row to row; rows themselves are contiguous.
#pragma once
#include <cstdint>

#include "../common/types.h"

namespace llmkern {

enum class Gate : int32_t { relu = 0, gelu = 1, gelu_tanh = 2, silu = 3 };

// out = f(gate) * up, contiguous.
struct GatedParams {
  const void *gate, *up;
  void* out;
  int64_t rows, width;
  int64_t gate_stride, up_stride;
  Gate function;
  DType dtype;
  int threads;
};

// dgate = grad * up * f'(gate) and dup = grad * f(gate), with strides of their own.
struct GatedBackwardParams {
  const void *grad, *gate, *up;
  void *dgate, *dup;
  int64_t rows, width;
  int64_t grad_stride, gate_stride, up_stride, dgate_stride, dup_stride;
  Gate function;
  DType dtype;
  int threads;
};

}  // namespace llmkern
