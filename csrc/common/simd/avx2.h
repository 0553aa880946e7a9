// Vector operations with AVX2, FMA and F16C: 8 floats a register, 16 registers.
// simd/portable.h documents the operations that all of these headers share.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "../isa.h"
#include "../types.h"

#define LLMKERN_SIMD_AVX2

namespace llmkern::LLMKERN_ISA {

constexpr int kWidth = 8;
constexpr int kRegisters = 16;
constexpr bool kBf16Dot = false;
using Float = __m256;
using Int = __m256i;

LLMKERN_INLINE Float zero() { return _mm256_setzero_ps(); }
LLMKERN_INLINE Float broadcast(float x) { return _mm256_set1_ps(x); }
LLMKERN_INLINE Int broadcast_int(int32_t x) { return _mm256_set1_epi32(x); }
LLMKERN_INLINE Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
LLMKERN_INLINE Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
LLMKERN_INLINE Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
LLMKERN_INLINE Float div(Float a, Float b) { return _mm256_div_ps(a, b); }
LLMKERN_INLINE Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
LLMKERN_INLINE Float max(Float a, Float b) { return _mm256_max_ps(a, b); }
LLMKERN_INLINE Float min(Float a, Float b) { return _mm256_min_ps(a, b); }
LLMKERN_INLINE Float abs(Float a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
LLMKERN_INLINE Float swap_pairs(Float a) { return _mm256_permute_ps(a, 0xB1); }

LLMKERN_INLINE Int as_int(Float a) { return _mm256_castps_si256(a); }
LLMKERN_INLINE Float as_float(Int a) { return _mm256_castsi256_ps(a); }
LLMKERN_INLINE Int round_to_int(Float a) { return _mm256_cvtps_epi32(a); }
LLMKERN_INLINE Float to_float(Int a) { return _mm256_cvtepi32_ps(a); }
LLMKERN_INLINE Int add(Int a, Int b) { return _mm256_add_epi32(a, b); }
LLMKERN_INLINE Int sub(Int a, Int b) { return _mm256_sub_epi32(a, b); }
template <int N>
LLMKERN_INLINE Int shift_left(Int a) {
  return _mm256_slli_epi32(a, N);
}

LLMKERN_INLINE Int mul(Int a, Int b) { return _mm256_mullo_epi32(a, b); }

// In 16 bits: vpmaddubsw on bytes would cut off sums at 32767.
LLMKERN_INLINE void transpose(Float* rows) {
  Float t[8], r[8];
#pragma GCC unroll 8
  for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      r[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
      r[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
    }
#pragma GCC unroll 8
  for (int i = 0; i < 4; i++) {
    rows[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    rows[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
}

LLMKERN_INLINE float sum(Float a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
LLMKERN_INLINE float largest(Float a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

// All bits set in the first n lanes.
LLMKERN_INLINE __m256i first_mask(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
LLMKERN_INLINE Float first(int n, Float a, Float b) {
  return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(first_mask(n)));
}
LLMKERN_INLINE Float keep(const uint8_t* mask, Float a, Float b) {
  __m256i m = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(mask)));
  __m256i masked = _mm256_cmpeq_epi32(m, _mm256_setzero_si256());
  return _mm256_blendv_ps(a, b, _mm256_castsi256_ps(masked));
}

LLMKERN_INLINE Float where_equal(Float a, Float b, Float x, Float y) {
  return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_EQ_OQ));
}
LLMKERN_INLINE Float where_less(Float a, Float b, Float x, Float y) {
  return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}

LLMKERN_INLINE Float load(const float* p) { return _mm256_loadu_ps(p); }
LLMKERN_INLINE Float load(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
LLMKERN_INLINE void store(float* p, Float a) { _mm256_storeu_ps(p, a); }
LLMKERN_INLINE Float load_first(const float* p, int n) { return _mm256_maskload_ps(p, first_mask(n)); }
LLMKERN_INLINE void store_first(float* p, Float a, int n) { _mm256_maskstore_ps(p, first_mask(n), a); }

LLMKERN_INLINE Float widen(__m128i bits, Bf16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
LLMKERN_INLINE Float widen(__m128i bits, Fp16) { return _mm256_cvtph_ps(bits); }
LLMKERN_INLINE __m128i narrow(Float a, Bf16) {  // to nearest, ties to even; NaN stays NaN
  __m256i x = _mm256_castps_si256(a);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(x, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_or_si256(x, _mm256_set1_epi32(0x400000)), nan);
  __m256i high = _mm256_srli_epi32(rounded, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
LLMKERN_INLINE __m128i narrow(Float a, Fp16) {
  return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
template <class T>
LLMKERN_INLINE Float load(const T* p) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), T{});
}
template <class T>
LLMKERN_INLINE void store(T* p, Float a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(a, T{}));
}
template <class T>
LLMKERN_INLINE Float load_first(const T* p, int n) {
  alignas(16) uint16_t bits[8] = {};
  std::memcpy(bits, p, 2 * static_cast<size_t>(n));
  return widen(_mm_load_si128(reinterpret_cast<const __m128i*>(bits)), T{});
}
template <class T>
LLMKERN_INLINE void store_first(T* p, Float a, int n) {
  alignas(16) uint16_t bits[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(bits), narrow(a, T{}));
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

// acc + lo(a) * lo(b) + hi(a) * hi(b), each lane of a and b holding two bf16 values.
LLMKERN_INLINE Float dot_bf16(Float acc, Int a, Int b) {
  const __m256i high = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u));
  acc = fma(as_float(shift_left<16>(a)), as_float(shift_left<16>(b)), acc);
  return fma(as_float(_mm256_and_si256(a, high)), as_float(_mm256_and_si256(b, high)), acc);
}

}  // namespace llmkern::LLMKERN_ISA
