// What the normalisation kernels know of a row: its factors, and the types of its elements.
#pragma once
#include "../common/row.h"

namespace llmkern::LLMKERN_ISA {

// The factors of a row: offset + weight, or 1 without weights.
template <class W>
struct Factors {
  const W* weight;
  Float offset;
  Float at(int64_t d, int n) const { return weight ? add(offset, load_some(weight + d, n)) : broadcast(1.0f); }
};

// Calls f with a value of the element type and one of the weights' type; weights are of either or float.
template <class F>
LLMKERN_INLINE void with_types(DType dtype, DType weight_dtype, F f) {
  const bool plain = weight_dtype == DType::f32;
  if (dtype == DType::bf16) return plain ? f(Bf16{}, float{}) : f(Bf16{}, Bf16{});
  if (dtype == DType::f16) return plain ? f(Fp16{}, float{}) : f(Fp16{}, Fp16{});
  f(float{}, float{});
}

}  // namespace llmkern::LLMKERN_ISA
