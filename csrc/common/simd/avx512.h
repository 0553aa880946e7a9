// Vector operations with AVX-512 (F, BW, DQ, VL, VNNI, BF16): 16 floats a register, 32 registers.
// simd/portable.h documents the operations that all of these headers share.
#pragma once
#ifdef LLMKERN_EMULATE_AVX512  // the tests run this file on any processor, by an emulation of the instructions
#include "../../../tests/emulation/avx512.h"
#else
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../isa.h"
#include "../types.h"

#define LLMKERN_SIMD_AVX512

namespace llmkern::LLMKERN_ISA {

constexpr int kWidth = 16;
constexpr int kRegisters = 32;
constexpr bool kBf16Dot = true;
using Float = __m512;
using Int = __m512i;

LLMKERN_INLINE Float zero() { return _mm512_setzero_ps(); }
LLMKERN_INLINE Float broadcast(float x) { return _mm512_set1_ps(x); }
LLMKERN_INLINE Int broadcast_int(int32_t x) { return _mm512_set1_epi32(x); }
LLMKERN_INLINE Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
LLMKERN_INLINE Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
LLMKERN_INLINE Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
LLMKERN_INLINE Float div(Float a, Float b) { return _mm512_div_ps(a, b); }
LLMKERN_INLINE Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
LLMKERN_INLINE Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
LLMKERN_INLINE Float min(Float a, Float b) { return _mm512_min_ps(a, b); }
LLMKERN_INLINE Float abs(Float a) { return _mm512_abs_ps(a); }
LLMKERN_INLINE Float swap_pairs(Float a) { return _mm512_permute_ps(a, 0xB1); }

LLMKERN_INLINE Int as_int(Float a) { return _mm512_castps_si512(a); }
LLMKERN_INLINE Float as_float(Int a) { return _mm512_castsi512_ps(a); }
LLMKERN_INLINE Int round_to_int(Float a) { return _mm512_cvtps_epi32(a); }
LLMKERN_INLINE Float to_float(Int a) { return _mm512_cvtepi32_ps(a); }
LLMKERN_INLINE Int add(Int a, Int b) { return _mm512_add_epi32(a, b); }
LLMKERN_INLINE Int sub(Int a, Int b) { return _mm512_sub_epi32(a, b); }
template <int N>
LLMKERN_INLINE Int shift_left(Int a) {
  return _mm512_slli_epi32(a, N);
}

LLMKERN_INLINE Int mul(Int a, Int b) { return _mm512_mullo_epi32(a, b); }

LLMKERN_INLINE void transpose(Float* rows) {
  Int r[16], t[16];
  // Pairs of rows, then pairs of pairs within each quarter of 128 bits; then the quarters change places.
#pragma GCC unroll 16
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(as_int(rows[2 * i]), as_int(rows[2 * i + 1]));
    t[2 * i + 1] = _mm512_unpackhi_epi32(as_int(rows[2 * i]), as_int(rows[2 * i + 1]));
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; i++)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      r[4 * i + 2 * j] = _mm512_unpacklo_epi64(t[4 * i + j], t[4 * i + j + 2]);
      r[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(t[4 * i + j], t[4 * i + j + 2]);
    }
#pragma GCC unroll 16
  for (int i = 0; i < 4; i++) {
    Int low = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), high = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    Int low2 = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88), high2 = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    rows[i] = as_float(_mm512_shuffle_i32x4(low, low2, 0x88));
    rows[i + 4] = as_float(_mm512_shuffle_i32x4(high, high2, 0x88));
    rows[i + 8] = as_float(_mm512_shuffle_i32x4(low, low2, 0xdd));
    rows[i + 12] = as_float(_mm512_shuffle_i32x4(high, high2, 0xdd));
  }
}

// What works on each quarter of 128 bits, a quad of units, by itself; of the other instruction sets none has it.
#define LLMKERN_QUADS
// Half a register, of two quads: these change places between two of them by one shuffle of half the width, where four
// whole ones would take eight of the full width.
using Half = __m256;
LLMKERN_INLINE Half zero_half() { return _mm256_setzero_ps(); }
// Units of T, floats or bf16 pairs: into a register, and not anew for every use, as g++ would have it.
template <class T>
LLMKERN_INLINE Half load_half(const T* p) {
  Half a;
  if constexpr (std::is_same<T, Fp16>::value)
    a = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  else
    a = _mm256_loadu_ps(reinterpret_cast<const float*>(p));
#ifndef LLMKERN_EMULATE_AVX512
  asm("" : "+v"(a));
#endif
  return a;
}
LLMKERN_INLINE Half near_half(const float* p) { return _mm256_loadu_ps(p); }  // where it is used, from memory
// a gets the first quads of both, b the second ones.
LLMKERN_INLINE void exchange_quads(Half& a, Half& b) {
  Half first = _mm256_insertf128_ps(a, _mm256_castps256_ps128(b), 1);
  b = _mm256_permute2f128_ps(a, b, 0x31), a = first;
}
template <bool kPair>
LLMKERN_INLINE Half multiply_add_halves(Half a, Half b, Half sum) {
  if constexpr (kPair)
    return _mm256_dpbf16_ps(sum, reinterpret_cast<__m256bh>(a), reinterpret_cast<__m256bh>(b));
  else
    return _mm256_fmadd_ps(a, b, sum);
}
LLMKERN_INLINE Float join(Half low, Half high) {
  return as_float(_mm512_inserti64x4(_mm512_castsi256_si512(_mm256_castps_si256(low)), _mm256_castps_si256(high), 1));
}
// Vector i gets, in each quad, element i of that quad of each of the four.
LLMKERN_INLINE void transpose_in_quads(Float& a, Float& b, Float& c, Float& d) {
  Int ab = _mm512_unpacklo_epi32(as_int(a), as_int(b)), ab2 = _mm512_unpackhi_epi32(as_int(a), as_int(b));
  Int cd = _mm512_unpacklo_epi32(as_int(c), as_int(d)), cd2 = _mm512_unpackhi_epi32(as_int(c), as_int(d));
  a = as_float(_mm512_unpacklo_epi64(ab, cd)), b = as_float(_mm512_unpackhi_epi64(ab, cd));
  c = as_float(_mm512_unpacklo_epi64(ab2, cd2)), d = as_float(_mm512_unpackhi_epi64(ab2, cd2));
}
// Two rows of 32 elements as 32 pairs: in each quad of `low` the pairs of the first four elements of 128 bits, in
// `high` those of the others. in_order puts sums over such pairs into the order of the elements.
LLMKERN_INLINE void pair(const Bf16* x, const Bf16* y, Float& low, Float& high) {
  Int a = _mm512_loadu_si512(x), b = _mm512_loadu_si512(y);
  low = as_float(_mm512_unpacklo_epi16(a, b)), high = as_float(_mm512_unpackhi_epi16(a, b));
}
LLMKERN_INLINE void in_order(Float& low, Float& high) {
  Int a = _mm512_shuffle_i32x4(as_int(low), as_int(high), 0x44);
  Int b = _mm512_shuffle_i32x4(as_int(low), as_int(high), 0xee);
  low = as_float(_mm512_shuffle_i32x4(a, a, 0xd8)), high = as_float(_mm512_shuffle_i32x4(b, b, 0xd8));
}

LLMKERN_INLINE float sum(Float a) { return _mm512_reduce_add_ps(a); }
LLMKERN_INLINE float largest(Float a) { return _mm512_reduce_max_ps(a); }

LLMKERN_INLINE __mmask16 first_mask(int n) { return static_cast<__mmask16>((1u << n) - 1); }
LLMKERN_INLINE Float first(int n, Float a, Float b) { return _mm512_mask_blend_ps(first_mask(n), b, a); }
LLMKERN_INLINE Float keep(const uint8_t* mask, Float a, Float b) {
  __m128i m = _mm_loadu_si128(reinterpret_cast<const __m128i*>(mask));
  return _mm512_mask_blend_ps(_mm_test_epi8_mask(m, m), b, a);
}

LLMKERN_INLINE Float where_equal(Float a, Float b, Float x, Float y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ), y, x);
}
LLMKERN_INLINE Float where_less(Float a, Float b, Float x, Float y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
}

LLMKERN_INLINE Float load(const float* p) { return _mm512_loadu_ps(p); }
LLMKERN_INLINE Float load(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
LLMKERN_INLINE void store(float* p, Float a) { _mm512_storeu_ps(p, a); }
LLMKERN_INLINE Float load_first(const float* p, int n) { return _mm512_maskz_loadu_ps(first_mask(n), p); }
LLMKERN_INLINE void store_first(float* p, Float a, int n) { _mm512_mask_storeu_ps(p, first_mask(n), a); }

LLMKERN_INLINE Float widen(__m256i bits, Bf16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
LLMKERN_INLINE Float widen(__m256i bits, Fp16) { return _mm512_cvtph_ps(bits); }
// By hand and not vcvtneps2bf16, which flushes subnormal numbers to zero.
LLMKERN_INLINE __m256i narrow(Float a, Bf16) {  // to nearest, ties to even; NaN stays NaN
  __m512i x = _mm512_castps_si512(a);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(x, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, x, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
LLMKERN_INLINE __m256i narrow(Float a, Fp16) {
  return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
template <class T>
LLMKERN_INLINE Float load(const T* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{});
}
template <class T>
LLMKERN_INLINE void store(T* p, Float a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a, T{}));
}
template <class T>
LLMKERN_INLINE Float load_first(const T* p, int n) {
  return widen(_mm256_maskz_loadu_epi16(first_mask(n), p), T{});
}
template <class T>
LLMKERN_INLINE void store_first(T* p, Float a, int n) {
  _mm256_mask_storeu_epi16(p, first_mask(n), narrow(a, T{}));
}

LLMKERN_INLINE void store_flushed(Bf16* p, Float a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a)));
}
LLMKERN_INLINE void store_flushed(Bf16* p, Float a, Float b) {
  _mm512_storeu_si512(p, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)));
}

LLMKERN_INLINE void store_pairs(float* p, Float low, Float high) {
  __m512i a = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(low)));
  __m512i b = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(high)));
  _mm512_storeu_ps(p, _mm512_castsi512_ps(_mm512_or_si512(a, _mm512_slli_epi32(b, 16))));
}

LLMKERN_INLINE Float dot_bf16(Float acc, Int a, Int b) {
  return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

}  // namespace llmkern::LLMKERN_ISA
