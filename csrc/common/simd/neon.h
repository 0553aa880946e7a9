// Vector operations with Arm NEON (AArch64): 4 floats a register, 32 registers.
// simd/portable.h documents the operations that all of these headers share.
#pragma once
#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "../isa.h"
#include "../types.h"

#define LLMKERN_SIMD_NEON

namespace llmkern::LLMKERN_ISA {

constexpr int kWidth = 4;
constexpr int kRegisters = 32;
constexpr bool kBf16Dot = false;
using Float = float32x4_t;
using Int = int32x4_t;

LLMKERN_INLINE Float zero() { return vdupq_n_f32(0); }
LLMKERN_INLINE Float broadcast(float x) { return vdupq_n_f32(x); }
LLMKERN_INLINE Int broadcast_int(int32_t x) { return vdupq_n_s32(x); }
LLMKERN_INLINE Float add(Float a, Float b) { return vaddq_f32(a, b); }
LLMKERN_INLINE Float sub(Float a, Float b) { return vsubq_f32(a, b); }
LLMKERN_INLINE Float mul(Float a, Float b) { return vmulq_f32(a, b); }
LLMKERN_INLINE Float div(Float a, Float b) { return vdivq_f32(a, b); }
LLMKERN_INLINE Float fma(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }
LLMKERN_INLINE Float max(Float a, Float b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
LLMKERN_INLINE Float min(Float a, Float b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
LLMKERN_INLINE Float abs(Float a) { return vabsq_f32(a); }
LLMKERN_INLINE Float swap_pairs(Float a) { return vrev64q_f32(a); }

LLMKERN_INLINE Int as_int(Float a) { return vreinterpretq_s32_f32(a); }
LLMKERN_INLINE Float as_float(Int a) { return vreinterpretq_f32_s32(a); }
LLMKERN_INLINE Int round_to_int(Float a) {  // INT32_MIN out of range and for NaN, as on x86
  uint32x4_t inside = vcltq_f32(vabsq_f32(a), vdupq_n_f32(2147483648.0f));
  return vbslq_s32(inside, vcvtnq_s32_f32(a), vdupq_n_s32(INT32_MIN));
}
LLMKERN_INLINE Float to_float(Int a) { return vcvtq_f32_s32(a); }
LLMKERN_INLINE Int add(Int a, Int b) { return vaddq_s32(a, b); }
LLMKERN_INLINE Int sub(Int a, Int b) { return vsubq_s32(a, b); }
template <int N>
LLMKERN_INLINE Int shift_left(Int a) {
  return vshlq_n_s32(a, N);
}

LLMKERN_INLINE Int mul(Int a, Int b) { return vmulq_s32(a, b); }

// x and w: four values of 16 bits for the first k, then four for the second.
LLMKERN_INLINE void transpose(Float* rows) {
  float64x2_t a = vreinterpretq_f64_f32(vtrn1q_f32(rows[0], rows[1]));
  float64x2_t b = vreinterpretq_f64_f32(vtrn2q_f32(rows[0], rows[1]));
  float64x2_t c = vreinterpretq_f64_f32(vtrn1q_f32(rows[2], rows[3]));
  float64x2_t d = vreinterpretq_f64_f32(vtrn2q_f32(rows[2], rows[3]));
  rows[0] = vreinterpretq_f32_f64(vtrn1q_f64(a, c)), rows[1] = vreinterpretq_f32_f64(vtrn1q_f64(b, d));
  rows[2] = vreinterpretq_f32_f64(vtrn2q_f64(a, c)), rows[3] = vreinterpretq_f32_f64(vtrn2q_f64(b, d));
}

LLMKERN_INLINE float sum(Float a) { return vaddvq_f32(a); }
LLMKERN_INLINE float largest(Float a) { return vmaxvq_f32(a); }

LLMKERN_INLINE Float first(int n, Float a, Float b) {
  const int32_t lanes[4] = {0, 1, 2, 3};
  return vbslq_f32(vcltq_s32(vld1q_s32(lanes), vdupq_n_s32(n)), a, b);
}
LLMKERN_INLINE Float keep(const uint8_t* mask, Float a, Float b) {
  uint32x4_t m = {mask[0], mask[1], mask[2], mask[3]};
  return vbslq_f32(vtstq_u32(m, m), a, b);
}

LLMKERN_INLINE Float where_equal(Float a, Float b, Float x, Float y) { return vbslq_f32(vceqq_f32(a, b), x, y); }
LLMKERN_INLINE Float where_less(Float a, Float b, Float x, Float y) { return vbslq_f32(vcltq_f32(a, b), x, y); }

LLMKERN_INLINE Float load(const float* p) { return vld1q_f32(p); }
LLMKERN_INLINE Float load(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))))));
}
LLMKERN_INLINE void store(float* p, Float a) { vst1q_f32(p, a); }
LLMKERN_INLINE Float load_first(const float* p, int n) {
  float x[4] = {};
  std::memcpy(x, p, 4 * static_cast<size_t>(n));
  return vld1q_f32(x);
}
LLMKERN_INLINE void store_first(float* p, Float a, int n) {
  float x[4];
  vst1q_f32(x, a);
  std::memcpy(p, x, 4 * static_cast<size_t>(n));
}

LLMKERN_INLINE Float widen(uint16x4_t bits, Bf16) { return vreinterpretq_f32_u32(vshll_n_u16(bits, 16)); }
LLMKERN_INLINE Float widen(uint16x4_t bits, Fp16) { return vcvt_f32_f16(vreinterpret_f16_u16(bits)); }
LLMKERN_INLINE uint16x4_t narrow(Float a, Bf16) {  // to nearest, ties to even; NaN stays NaN
  uint32x4_t x = vreinterpretq_u32_f32(a);
  uint32x4_t odd = vandq_u32(vshrq_n_u32(x, 16), vdupq_n_u32(1));
  uint32x4_t rounded = vaddq_u32(x, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  uint32x4_t number = vceqq_f32(a, a);
  return vshrn_n_u32(vbslq_u32(number, rounded, vorrq_u32(x, vdupq_n_u32(0x400000))), 16);
}
LLMKERN_INLINE uint16x4_t narrow(Float a, Fp16) { return vreinterpret_u16_f16(vcvt_f16_f32(a)); }
template <class T>
LLMKERN_INLINE Float load(const T* p) {
  return widen(vld1_u16(reinterpret_cast<const uint16_t*>(p)), T{});
}
template <class T>
LLMKERN_INLINE void store(T* p, Float a) {
  vst1_u16(reinterpret_cast<uint16_t*>(p), narrow(a, T{}));
}
template <class T>
LLMKERN_INLINE Float load_first(const T* p, int n) {
  uint16_t bits[4] = {};
  std::memcpy(bits, p, 2 * static_cast<size_t>(n));
  return widen(vld1_u16(bits), T{});
}
template <class T>
LLMKERN_INLINE void store_first(T* p, Float a, int n) {
  uint16_t bits[4];
  vst1_u16(bits, narrow(a, T{}));
  std::memcpy(p, bits, 2 * static_cast<size_t>(n));
}

LLMKERN_INLINE void store_flushed(Bf16* p, Float a) { store(p, a); }
LLMKERN_INLINE void store_flushed(Bf16* p, Float a, Float b) { store(p, a), store(p + kWidth, b); }

LLMKERN_INLINE void store_pairs(float* p, Float low, Float high) {
  Bf16 a[kWidth], b[kWidth];
  store(a, low), store(b, high);
  for (int i = 0; i < kWidth; i++) {
    uint32_t pair = a[i].bits | static_cast<uint32_t>(b[i].bits) << 16;
    std::memcpy(p + i, &pair, 4);
  }
}

LLMKERN_INLINE Float dot_bf16(Float acc, Int a, Int b) {
  const int32x4_t high = vdupq_n_s32(static_cast<int32_t>(0xffff0000u));
  acc = fma(as_float(shift_left<16>(a)), as_float(shift_left<16>(b)), acc);
  return fma(as_float(vandq_s32(a, high)), as_float(vandq_s32(b, high)), acc);
}

}  // namespace llmkern::LLMKERN_ISA
