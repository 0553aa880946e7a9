// What every CUDA kernel needs: 16-byte accesses, conversions, index arithmetic.
//
// Written so that tests/emulation/cuda can compile a .cu file with the host's compiler and run it on the CPU: what only
// a GPU has stands behind __CUDACC__.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "types.h"

#ifndef __CUDACC__
#include "simd/portable.h"
#endif

#define LLMKERN_DEVICE __device__ __forceinline__

namespace llmkern::device {

// How many elements 16 bytes hold, the widest access that a thread makes.
template <class T>
constexpr int kLanes = 16 / sizeof(T);

#ifdef __CUDACC__
LLMKERN_DEVICE float bits_to_float(uint32_t x) { return __uint_as_float(x); }
LLMKERN_DEVICE uint32_t float_to_bits(float x) { return __float_as_uint(x); }
LLMKERN_DEVICE float widen(Fp16 x) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x.bits));
  return f;
}
LLMKERN_DEVICE Fp16 narrow(float x, Fp16) {
  Fp16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
LLMKERN_DEVICE Bf16 narrow(float x, Bf16) {
  Bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
LLMKERN_DEVICE uint32_t narrow_pair(float low, float high, Fp16) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
LLMKERN_DEVICE uint32_t narrow_pair(float low, float high, Bf16) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
LLMKERN_DEVICE uint4 load16(const void* p) { return *static_cast<const uint4*>(p); }
// By an instruction of its own: nvcc takes an assignment of a uint4 that was just computed apart, into four stores.
LLMKERN_DEVICE void store16(void* p, uint4 x) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(x.x), "r"(x.y),
               "r"(x.z), "r"(x.w)
               : "memory");
}
LLMKERN_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }
// Two neighbouring lanes have 32 bytes each, as two halves. Afterwards `first` has a half each of the even lane's and
// `second` of the odd lane's, so that one access of the two is a whole sector; done again, it is as before. All lanes
// of the warp take part.
LLMKERN_DEVICE void trade_halves(uint4& first, uint4& second, bool odd) {
  const uint32_t given[4] = {odd ? first.x : second.x, odd ? first.y : second.y, odd ? first.z : second.z,
                             odd ? first.w : second.w};
  uint32_t got[4];
#pragma unroll
  for (int i = 0; i < 4; i++) got[i] = __shfl_xor_sync(0xffffffffu, given[i], 1);
  (odd ? first : second) = make_uint4(got[0], got[1], got[2], got[3]);
}
// Says in the PTX how many bytes of dynamic shared memory the kernel is launched with, which its code does not tell and
// `python -m llmkern inspect` wants to know. It makes no instruction.
template <int kBytes>
LLMKERN_DEVICE void note_shared_bytes() {
  asm volatile("// llmkern.shared_bytes %0" ::"n"(kBytes));
}
#else
template <int kBytes>
LLMKERN_DEVICE void note_shared_bytes() {}
LLMKERN_DEVICE float bits_to_float(uint32_t x) { return portable::scalar_from_bits(x); }
LLMKERN_DEVICE uint32_t float_to_bits(float x) { return portable::scalar_bits(x); }
LLMKERN_DEVICE float widen(Fp16 x) { return portable::widen(x); }
LLMKERN_DEVICE Fp16 narrow(float x, Fp16) { return portable::narrow(x, Fp16{}); }
LLMKERN_DEVICE Bf16 narrow(float x, Bf16) { return portable::narrow(x, Bf16{}); }
template <class T>
LLMKERN_DEVICE uint32_t narrow_pair(float low, float high, T) {
  return narrow(low, T{}).bits | static_cast<uint32_t>(narrow(high, T{}).bits) << 16;
}
LLMKERN_DEVICE uint4 load16(const void* p) { return *static_cast<const uint4*>(emulation::aligned16(p)); }
LLMKERN_DEVICE void store16(void* p, uint4 x) { *static_cast<uint4*>(emulation::aligned16(p)) = x; }
LLMKERN_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }
#endif

LLMKERN_DEVICE float widen(float x) { return x; }
LLMKERN_DEVICE float widen(Bf16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
LLMKERN_DEVICE float narrow(float x, float) { return x; }

LLMKERN_DEVICE void widen_pair(uint32_t x, float* out, Bf16) {
  out[0] = bits_to_float(x << 16);
  out[1] = bits_to_float(x & 0xffff0000u);
}
LLMKERN_DEVICE void widen_pair(uint32_t x, float* out, Fp16) {
  out[0] = widen(Fp16{static_cast<uint16_t>(x)});
  out[1] = widen(Fp16{static_cast<uint16_t>(x >> 16)});
}

// kCount elements as floats, kCount a multiple of kLanes<T>. Aligned: p is a multiple of 16 bytes, all are there.
// Otherwise the first n are there, and the others are 0.
template <bool kAligned, int kCount, class T>
LLMKERN_DEVICE void read(const T* p, float* out, int n) {
  if constexpr (kAligned) {
#pragma unroll
    for (int i = 0; i < kCount; i += kLanes<T>) {
      uint4 x = load16(p + i);
      const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        if constexpr (sizeof(T) == 4)
          out[i + j] = bits_to_float(words[j]);
        else
          widen_pair(words[j], out + i + 2 * j, T{});
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; i++) out[i] = i < n ? widen(p[i]) : 0.0f;
  }
}

// kLanes<T> elements in their 16 bytes.
template <class T>
LLMKERN_DEVICE uint4 pack(const float* x) {
  uint32_t words[4];
#pragma unroll
  for (int j = 0; j < 4; j++) {
    if constexpr (sizeof(T) == 4)
      words[j] = float_to_bits(x[j]);
    else
      words[j] = narrow_pair(x[2 * j], x[2 * j + 1], T{});
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

template <bool kAligned, int kCount, class T>
LLMKERN_DEVICE void write(T* p, const float* x, int n) {
  if constexpr (kAligned) {
#pragma unroll
    for (int i = 0; i < kCount; i += kLanes<T>) store16(p + i, pack<T>(x + i));
  } else {
#pragma unroll
    for (int i = 0; i < kCount; i++)
      if (i < n) p[i] = narrow(x[i], T{});
  }
}

// a / b for 0 <= a, 0 < b: in 32 bits where both fit, which is several times shorter on a GPU.
LLMKERN_DEVICE int64_t divide(int64_t a, int64_t b) {
  if ((static_cast<uint64_t>(a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

}  // namespace llmkern::device
