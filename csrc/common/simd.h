// The vector operations of the instruction set that this file is being compiled for.
#pragma once
#include "isa.h"

#define LLMKERN_QUOTE_(x) #x
#define LLMKERN_QUOTE(x) LLMKERN_QUOTE_(x)
// clang-format off: no spaces in a path
#define LLMKERN_SIMD_HEADER_(name) simd/name.h
// clang-format on
#define LLMKERN_SIMD_HEADER(name) LLMKERN_SIMD_HEADER_(name)
#include LLMKERN_QUOTE(LLMKERN_SIMD_HEADER(LLMKERN_ISA))

namespace llmkern::LLMKERN_ISA {

// One element, converted by the same instructions as a whole vector.
LLMKERN_INLINE float load_one(const float* p) { return *p; }
template <class T>
LLMKERN_INLINE float load_one(const T* p) {
  alignas(64) float x[kWidth];
  store(x, load_first(p, 1));
  return x[0];
}
template <class T>
LLMKERN_INLINE void store_one(T* p, float x) {
  store_first(p, broadcast(x), 1);
}

}  // namespace llmkern::LLMKERN_ISA
