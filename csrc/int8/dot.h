// Exact sums of products of int8 weights and the two digits of a quantised activation, for each instruction set.
//
// An activation is an integer u: its low digit u & 255, its high digit u >> 8, of -127..127 (quantize.h). A register of
// 32-bit sums takes a step: kDotDepth neighbouring values of k of one activation row, for every lane, with a register
// of weights, kDotDepth of one output after another. In memory a digit is a Low or a High, which may hold another
// number: the low one less kLowOffset; what the instruction adds for a high one is made good by kHighOffset times the
// row's sum of high digits.
#pragma once
#include <cstring>

#include "../common/simd.h"

namespace llmkern::LLMKERN_ISA {

// LLMKERN_INLINE void store_low(Low* p, Int u)                kWidth low digits of numbers cut off at 0 and 255
// LLMKERN_INLINE void store_digits(Low* p, High* h, Int u)    both digits of kWidth numbers in -32512..32767
// LLMKERN_INLINE void store_lows(Low* p, const Int* u)        low digits of 64 numbers, kRun vectors, cut off at 0 and
// 255 LLMKERN_INLINE int store_both(Low* p, High* h, const Int* u)  both digits of 64 numbers; bit i: quad i has a high
// one LLMKERN_INLINE Int load_weights(const int8_t* p)            kWidth * kDotDepth weights LLMKERN_INLINE Int dot(Int
// sum, Int x, Int w)               low digits LLMKERN_INLINE Int high_weights(Int w)                      what dot_high
// takes of these weights LLMKERN_INLINE Int dot_high(Int sum, Int x, Int w)          high digits LLMKERN_INLINE int
// high_quads(Int u)                        bit i: one of lanes 4 i to 4 i + 3 has a high digit
#if defined(LLMKERN_SIMD_AVX512)
constexpr int kDotDepth = 4;
using Low = uint8_t;
using High = int8_t;
constexpr int kLowOffset = 0, kHighOffset = 128;
LLMKERN_INLINE void store_low(Low* p, Int u) {
  u = _mm512_max_epi32(u, _mm512_setzero_si512());
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtusepi32_epi8(u));
}
#define LLMKERN_RUNS
// Packing works in quarters of 128 bits: quarter i of its result has lanes 4 i to 4 i + 3 of each vector.
constexpr int32_t kQuartersInOrder[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
LLMKERN_INLINE Int in_order(Int packed) {
  return _mm512_permutexvar_epi32(_mm512_loadu_si512(kQuartersInOrder), packed);
}
LLMKERN_INLINE void store_lows(Low* p, const Int* u) {
  Int packed = _mm512_packus_epi16(_mm512_packs_epi32(u[0], u[1]), _mm512_packs_epi32(u[2], u[3]));
  _mm512_storeu_si512(p, in_order(packed));
}
LLMKERN_INLINE int store_both(Low* p, High* h, const Int* u) {
  Int low[4], high[4];
  for (int i = 0; i < 4; i++)
    low[i] = _mm512_and_si512(u[i], _mm512_set1_epi32(255)), high[i] = _mm512_srai_epi32(u[i], 8);
  store_lows(p, low);
  Int packed = in_order(_mm512_packs_epi16(_mm512_packs_epi32(high[0], high[1]), _mm512_packs_epi32(high[2], high[3])));
  _mm512_storeu_si512(h, packed);
  return _mm512_test_epi32_mask(packed, packed);
}
LLMKERN_INLINE void store_digits(Low* p, High* h, Int u) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(u));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(h), _mm512_cvtepi32_epi8(_mm512_srai_epi32(u, 8)));
}
LLMKERN_INLINE Int load_weights(const int8_t* p) { return _mm512_loadu_si512(p); }
LLMKERN_INLINE Int dot(Int sum, Int x, Int w) { return _mm512_dpbusd_epi32(sum, x, w); }
// The instruction takes one factor without a sign: for high digits the weight, by 128 too large.
LLMKERN_INLINE Int high_weights(Int w) { return _mm512_xor_si512(w, _mm512_set1_epi8(-128)); }
LLMKERN_INLINE Int dot_high(Int sum, Int x, Int w) { return _mm512_dpbusd_epi32(sum, w, x); }
LLMKERN_INLINE int high_quads(Int u) {
  Int high = _mm512_srai_epi32(u, 8);
  int m = _mm512_test_epi32_mask(high, high);
  return (m & 0xf ? 1 : 0) | (m & 0xf0 ? 2 : 0) | (m & 0xf00 ? 4 : 0) | (m & 0xf000 ? 8 : 0);
}

#elif defined(LLMKERN_SIMD_AVX2)
LLMKERN_INLINE Int cut_off(Int u) {
  return _mm256_min_epi32(_mm256_max_epi32(u, _mm256_setzero_si256()), _mm256_set1_epi32(255));
}
LLMKERN_INLINE __m128i words(Int u) {
  return _mm_packs_epi32(_mm256_castsi256_si128(u), _mm256_extracti128_si256(u, 1));
}
LLMKERN_INLINE Int low_digits(Int u) { return _mm256_and_si256(u, _mm256_set1_epi32(255)); }
LLMKERN_INLINE int high_quads(Int u) {
  Int none = _mm256_cmpeq_epi32(_mm256_srai_epi32(u, 8), _mm256_setzero_si256());
  int m = _mm256_movemask_ps(_mm256_castsi256_ps(none));
  return ((m & 0xf) != 0xf ? 1 : 0) | ((m & 0xf0) != 0xf0 ? 2 : 0);
}
#ifdef __AVXVNNI__
constexpr int kDotDepth = 4;
using Low = uint8_t;
using High = int8_t;
constexpr int kLowOffset = 0, kHighOffset = 128;
LLMKERN_INLINE void store_low(Low* p, Int u) {
  __m128i w = words(cut_off(u));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(w, w));
}
LLMKERN_INLINE void store_digits(Low* p, High* h, Int u) {
  __m128i low = words(low_digits(u)), high = words(_mm256_srai_epi32(u, 8));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(low, low));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(h), _mm_packs_epi16(high, high));
}
LLMKERN_INLINE Int load_weights(const int8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
LLMKERN_INLINE Int dot(Int sum, Int x, Int w) { return _mm256_dpbusd_avx_epi32(sum, x, w); }
LLMKERN_INLINE Int high_weights(Int w) { return _mm256_xor_si256(w, _mm256_set1_epi8(-128)); }
LLMKERN_INLINE Int dot_high(Int sum, Int x, Int w) { return _mm256_dpbusd_avx_epi32(sum, w, x); }
#else
// Products of bytes would saturate here (vpmaddubsw): both factors are widened to 16 bits first.
constexpr int kDotDepth = 2;
using Low = int16_t;
using High = int16_t;
constexpr int kLowOffset = 0, kHighOffset = 0;
LLMKERN_INLINE void store_low(Low* p, Int u) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), words(cut_off(u))); }
LLMKERN_INLINE void store_digits(Low* p, High* h, Int u) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), words(low_digits(u)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(h), words(_mm256_srai_epi32(u, 8)));
}
LLMKERN_INLINE Int load_weights(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
LLMKERN_INLINE Int dot(Int sum, Int x, Int w) { return _mm256_add_epi32(sum, _mm256_madd_epi16(x, w)); }
LLMKERN_INLINE Int high_weights(Int w) { return w; }
LLMKERN_INLINE Int dot_high(Int sum, Int x, Int w) { return dot(sum, x, w); }
#endif

#elif defined(LLMKERN_SIMD_NEON)
LLMKERN_INLINE int high_quads(Int u) { return vmaxvq_u32(vreinterpretq_u32_s32(vshrq_n_s32(u, 8))) != 0; }
LLMKERN_INLINE Int cut_off(Int u) { return vminq_s32(vmaxq_s32(u, vdupq_n_s32(0)), vdupq_n_s32(255)); }
#ifdef __ARM_FEATURE_DOTPROD
constexpr int kDotDepth = 4;
using Low = int8_t;
using High = int8_t;
constexpr int kLowOffset = 128, kHighOffset = 0;
LLMKERN_INLINE void store_bytes(int8_t* p, Int u) {
  int16x4_t w = vmovn_s32(u);
  int8x8_t b = vmovn_s16(vcombine_s16(w, w));
  std::memcpy(p, &b, 4);
}
LLMKERN_INLINE void store_low(Low* p, Int u) { store_bytes(p, vsubq_s32(cut_off(u), vdupq_n_s32(128))); }
LLMKERN_INLINE void store_digits(Low* p, High* h, Int u) {
  store_bytes(p, vsubq_s32(vandq_s32(u, vdupq_n_s32(255)), vdupq_n_s32(128)));
  store_bytes(h, vshrq_n_s32(u, 8));
}
LLMKERN_INLINE Int load_weights(const int8_t* p) { return vreinterpretq_s32_s8(vld1q_s8(p)); }
LLMKERN_INLINE Int dot(Int sum, Int x, Int w) {
  return vdotq_s32(sum, vreinterpretq_s8_s32(x), vreinterpretq_s8_s32(w));
}
#else
constexpr int kDotDepth = 2;
using Low = int16_t;
using High = int16_t;
constexpr int kLowOffset = 0, kHighOffset = 0;
LLMKERN_INLINE void store_low(Low* p, Int u) { vst1_s16(p, vmovn_s32(cut_off(u))); }
LLMKERN_INLINE void store_digits(Low* p, High* h, Int u) {
  vst1_s16(p, vmovn_s32(vandq_s32(u, vdupq_n_s32(255))));
  vst1_s16(h, vmovn_s32(vshrq_n_s32(u, 8)));
}
LLMKERN_INLINE Int load_weights(const int8_t* p) {
  int16x8_t w = vmovl_s8(vld1_s8(p));
  return vreinterpretq_s32_s16(vuzp1q_s16(w, vextq_s16(w, w, 1)));
}
LLMKERN_INLINE Int dot(Int sum, Int x, Int w) {
  int16x8_t a = vreinterpretq_s16_s32(x), b = vreinterpretq_s16_s32(w);
  return vmlal_high_s16(vmlal_s16(sum, vget_low_s16(a), vget_low_s16(b)), a, b);
}
#endif
LLMKERN_INLINE Int high_weights(Int w) { return w; }
LLMKERN_INLINE Int dot_high(Int sum, Int x, Int w) { return dot(sum, x, w); }

#else            // portable
constexpr int kDotDepth = 2;
using Low = int16_t;
using High = int16_t;
constexpr int kLowOffset = 0, kHighOffset = 0;
LLMKERN_INLINE void store_low(Low* p, Int u) {
  for (int i = 0; i < kWidth; i++) p[i] = static_cast<int16_t>(u[i] < 0 ? 0 : u[i] > 255 ? 255 : u[i]);
}
LLMKERN_INLINE void store_digits(Low* p, High* h, Int u) {
  for (int i = 0; i < kWidth; i++) p[i] = static_cast<int16_t>(u[i] & 255), h[i] = static_cast<int16_t>(u[i] >> 8);
}
LLMKERN_INLINE Int load_weights(const int8_t* p) {
  typedef int8_t Bytes __attribute__((vector_size(8)));
  typedef int16_t Halves __attribute__((vector_size(16)));
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return reinterpret_cast<Int>(__builtin_convertvector(bytes, Halves));
}
LLMKERN_INLINE Int dot(Int sum, Int x, Int w) {
#ifdef __SSE2__  // part of every x86-64 processor
  typedef int16_t Halves __attribute__((vector_size(16)));
  return sum +
         reinterpret_cast<Int>(__builtin_ia32_pmaddwd128(reinterpret_cast<Halves>(x), reinterpret_cast<Halves>(w)));
#else
  return sum + (shift_left<16>(x) >> 16) * (shift_left<16>(w) >> 16) + (x >> 16) * (w >> 16);
#endif
}
LLMKERN_INLINE Int high_weights(Int w) { return w; }
LLMKERN_INLINE Int dot_high(Int sum, Int x, Int w) { return dot(sum, x, w); }
LLMKERN_INLINE int high_quads(Int u) {
  Int h = u >> 8;
  return (h[0] | h[1] | h[2] | h[3]) != 0;
}
#endif

constexpr int kRun = 64 / kWidth;  // vectors
constexpr int kQuad = 4;           // values of k: what the bits of rows with high digits stand for
constexpr int kStepsOfQuad = kQuad / kDotDepth;

#ifndef LLMKERN_RUNS
LLMKERN_INLINE void store_lows(Low* p, const Int* u) {
#pragma GCC unroll 16
  for (int i = 0; i < kRun; i++) store_low(p + i * kWidth, u[i]);
}
LLMKERN_INLINE int store_both(Low* p, High* h, const Int* u) {
  int quads = 0;
#pragma GCC unroll 16
  for (int i = 0; i < kRun; i++) {
    store_digits(p + i * kWidth, h + i * kWidth, u[i]);
    quads |= high_quads(u[i]) << (i * kWidth / kQuad);
  }
  return quads;
}
#endif

template <class Digit>
LLMKERN_INLINE Int broadcast_step(const Digit* p) {  // kDotDepth digits, for every lane
  static_assert(sizeof(Digit) * kDotDepth == 4, "a step of one activation row fills a lane");
#if defined(LLMKERN_SIMD_NEON) && !defined(__ARM_FEATURE_DOTPROD)
  return vreinterpretq_s32_s16(vcombine_s16(vld1_dup_s16(p), vld1_dup_s16(p + 1)));
#else
  int32_t step;
  std::memcpy(&step, p, sizeof step);
  return broadcast_int(step);
#endif
}

}  // namespace llmkern::LLMKERN_ISA
