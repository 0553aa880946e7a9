// AVX-512 intrinsics executed on any x86-64 processor with AVX2, so that csrc's AVX-512 sources run where the hardware
// is missing. Written from the operation given for each in Intel's Intrinsics Guide; lanes are plain C++.
//
// Only what csrc uses is here: an intrinsic that is missing fails to compile ("target specific option mismatch").
// tests/emulation/avx512_check.cpp compares every one of them with the hardware on a processor that has it.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace emulated {

#define EMULATED static inline __attribute__((always_inline))

template <class To, class From>
EMULATED To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
template <class T>
struct Lanes {
  static constexpr int count = 64 / sizeof(T);
  T lane[count];
};
template <class T, class V>
EMULATED Lanes<T> lanes(V v) {
  return bits<Lanes<T>>(v);
}
template <class V, class T>
EMULATED V pack(const Lanes<T>& l) {
  return bits<V>(l);
}

// --- constants, casts
EMULATED __m512 setzero_ps() { return __m512{}; }
EMULATED __m512i setzero_si512() { return __m512i{}; }
EMULATED __m512 set1_ps(float x) { return x - __m512{}; }
EMULATED __m512i set1_epi32(int32_t x) {
  Lanes<int32_t> r;
  for (int32_t& lane : r.lane) lane = x;
  return pack<__m512i>(r);
}
EMULATED __m512i set1_epi8(int8_t x) {
  Lanes<int8_t> r;
  for (int8_t& lane : r.lane) lane = x;
  return pack<__m512i>(r);
}
EMULATED __m512i set1_epi16(int16_t x) {
  Lanes<int16_t> r;
  for (int16_t& lane : r.lane) lane = x;
  return pack<__m512i>(r);
}
EMULATED __m512i castps_si512(__m512 a) { return bits<__m512i>(a); }
EMULATED __m512 castsi512_ps(__m512i a) { return bits<__m512>(a); }
EMULATED __m512i castsi256_si512(__m256i a) {
  __m512i r{};
  std::memcpy(&r, &a, 32);
  return r;
}
EMULATED __m256i castsi512_si256(__m512i a) {
  __m256i r;
  std::memcpy(&r, &a, 32);
  return r;
}
EMULATED __m256 castps512_ps256(__m512 a) {
  __m256 r;
  std::memcpy(&r, &a, 32);
  return r;
}
EMULATED __m512i inserti64x4(__m512i a, __m256i b, int half) {
  std::memcpy(reinterpret_cast<char*>(&a) + 32 * (half & 1), &b, 32);
  return a;
}
EMULATED __m256i extracti64x4_epi64(__m512i a, int half) {
  __m256i r;
  std::memcpy(&r, reinterpret_cast<const char*>(&a) + 32 * (half & 1), 32);
  return r;
}
EMULATED __m256 extractf32x8_ps(__m512 a, int half) {
  return _mm256_castsi256_ps(extracti64x4_epi64(bits<__m512i>(a), half));
}

// --- arithmetic on floats
EMULATED __m512 add_ps(__m512 a, __m512 b) { return a + b; }
EMULATED __m512 sub_ps(__m512 a, __m512 b) { return a - b; }
EMULATED __m512 mul_ps(__m512 a, __m512 b) { return a * b; }
EMULATED __m512 div_ps(__m512 a, __m512 b) { return a / b; }
template <class Half>
EMULATED __m512 by_halves(__m512 a, __m512 b, __m512 c, Half half) {
  Lanes<float> x = lanes<float>(a), y = lanes<float>(b), z = lanes<float>(c), r;
  for (int i = 0; i < 16; i += 8)
    _mm256_storeu_ps(r.lane + i,
                     half(_mm256_loadu_ps(x.lane + i), _mm256_loadu_ps(y.lane + i), _mm256_loadu_ps(z.lane + i)));
  return pack<__m512>(r);
}
EMULATED __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return by_halves(a, b, c, [](__m256 x, __m256 y, __m256 z) { return _mm256_fmadd_ps(x, y, z); });
}
EMULATED __m512 fnmadd_ps(__m512 a, __m512 b, __m512 c) {
  return by_halves(a, b, c, [](__m256 x, __m256 y, __m256 z) { return _mm256_fnmadd_ps(x, y, z); });
}
EMULATED __m512 fmsub_ps(__m512 a, __m512 b, __m512 c) {
  return by_halves(a, b, c, [](__m256 x, __m256 y, __m256 z) { return _mm256_fmsub_ps(x, y, z); });
}
EMULATED __m512 max_ps(__m512 a, __m512 b) {
  return by_halves(a, b, b, [](__m256 x, __m256 y, __m256) { return _mm256_max_ps(x, y); });
}
EMULATED __m512 min_ps(__m512 a, __m512 b) {
  return by_halves(a, b, b, [](__m256 x, __m256 y, __m256) { return _mm256_min_ps(x, y); });
}
EMULATED __m512 sqrt_ps(__m512 a) {
  return by_halves(a, a, a, [](__m256 x, __m256, __m256) { return _mm256_sqrt_ps(x); });
}
EMULATED __m512i abs_bits(__m512i a) {
  Lanes<uint32_t> r = lanes<uint32_t>(a);
  for (uint32_t& lane : r.lane) lane &= 0x7fffffffu;
  return pack<__m512i>(r);
}
EMULATED __m512 abs_ps(__m512 a) { return bits<__m512>(abs_bits(bits<__m512i>(a))); }
// The order of the guide: lane i with lane i + 8, then + 4, + 2, + 1.
EMULATED float reduce_add_ps(__m512 a) {
  Lanes<float> x = lanes<float>(a);
  for (int step = 8; step; step /= 2)
    for (int i = 0; i < step; i++) x.lane[i] += x.lane[i + step];
  return x.lane[0];
}
EMULATED float reduce_max_ps(__m512 a) {
  Lanes<float> x = lanes<float>(a);
  for (int step = 8; step; step /= 2)
    for (int i = 0; i < step; i++) x.lane[i] = x.lane[i] > x.lane[i + step] ? x.lane[i] : x.lane[i + step];
  return x.lane[0];
}
EMULATED float reduce_min_ps(__m512 a) {
  Lanes<float> x = lanes<float>(a);
  for (int step = 8; step; step /= 2)
    for (int i = 0; i < step; i++) x.lane[i] = x.lane[i] < x.lane[i + step] ? x.lane[i] : x.lane[i + step];
  return x.lane[0];
}

// --- integers
template <class T, class F>
EMULATED __m512i map(__m512i a, __m512i b, F f) {
  Lanes<T> x = lanes<T>(a), y = lanes<T>(b), r;
  for (int i = 0; i < Lanes<T>::count; i++) r.lane[i] = static_cast<T>(f(x.lane[i], y.lane[i]));
  return pack<__m512i>(r);
}
EMULATED __m512i add_epi32(__m512i a, __m512i b) {
  return map<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x + y; });
}
EMULATED __m512i sub_epi32(__m512i a, __m512i b) {
  return map<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x - y; });
}
EMULATED __m512i mullo_epi32(__m512i a, __m512i b) {
  return map<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x * y; });
}
EMULATED __m512i max_epi32(__m512i a, __m512i b) {
  return map<int32_t>(a, b, [](int32_t x, int32_t y) { return x > y ? x : y; });
}
EMULATED __m512i min_epi32(__m512i a, __m512i b) {
  return map<int32_t>(a, b, [](int32_t x, int32_t y) { return x < y ? x : y; });
}
EMULATED __m512i and_si512(__m512i a, __m512i b) {
  return map<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x & y; });
}
EMULATED __m512i or_si512(__m512i a, __m512i b) {
  return map<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x | y; });
}
EMULATED __m512i xor_si512(__m512i a, __m512i b) {
  return map<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x ^ y; });
}
EMULATED __m512i slli_epi32(__m512i a, unsigned n) {
  return map<uint32_t>(a, a, [n](uint32_t x, uint32_t) { return n > 31 ? 0u : x << n; });
}
EMULATED __m512i srli_epi32(__m512i a, unsigned n) {
  return map<uint32_t>(a, a, [n](uint32_t x, uint32_t) { return n > 31 ? 0u : x >> n; });
}
EMULATED __m512i srai_epi32(__m512i a, unsigned n) {
  return map<int32_t>(a, a, [n](int32_t x, int32_t) { return x >> (n > 31 ? 31 : n); });
}
EMULATED int32_t reduce_add_epi32(__m512i a) {
  uint32_t sum = 0;
  for (uint32_t lane : lanes<uint32_t>(a).lane) sum += lane;
  return static_cast<int32_t>(sum);
}
// VNNI: four products of unsigned by signed bytes into each int32 lane, without saturation.
EMULATED __m512i dpbusd_epi32(__m512i acc, __m512i a, __m512i b) {
  Lanes<uint32_t> r = lanes<uint32_t>(acc);
  Lanes<uint8_t> x = lanes<uint8_t>(a);
  Lanes<int8_t> y = lanes<int8_t>(b);
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 4; j++) r.lane[i] += static_cast<uint32_t>(x.lane[4 * i + j] * y.lane[4 * i + j]);
  return pack<__m512i>(r);
}
// BF16: acc + the odd product, then + the even one; subnormal inputs and results count as zero.
EMULATED float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
EMULATED __m256i cvtneps_pbh(__m512 a) {  // to nearest, ties to even; NaN stays NaN
  Lanes<float> x = lanes<float>(a);
  uint16_t r[16];
  for (int i = 0; i < 16; i++) {
    uint32_t b = bits<uint32_t>(flushed(x.lane[i]));
    r[i] = static_cast<uint16_t>((std::isnan(x.lane[i]) ? b | 0x400000u : b + 0x7fffu + (b >> 16 & 1u)) >> 16);
  }
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(r));
}
EMULATED __m512 dpbf16_ps(__m512 acc, __m512bh a, __m512bh b) {
  Lanes<float> r = lanes<float>(acc);
  Lanes<uint32_t> x = lanes<uint32_t>(a), y = lanes<uint32_t>(b);
  for (int i = 0; i < 16; i++) {
    auto high = [](uint32_t v) { return flushed(bits<float>(v & 0xffff0000u)); };
    auto low = [](uint32_t v) { return flushed(bits<float>(v << 16)); };
    r.lane[i] = flushed(std::fma(high(x.lane[i]), high(y.lane[i]), flushed(r.lane[i])));
    r.lane[i] = flushed(std::fma(low(x.lane[i]), low(y.lane[i]), r.lane[i]));
  }
  return pack<__m512>(r);
}
EMULATED __m256 dpbf16_ps(__m256 acc, __m256bh a, __m256bh b) {
  auto whole = [](auto half) { return inserti64x4(__m512i{}, bits<__m256i>(half), 0); };
  __m512 r = dpbf16_ps(bits<__m512>(whole(acc)), bits<__m512bh>(whole(a)), bits<__m512bh>(whole(b)));
  return bits<__m256>(extracti64x4_epi64(bits<__m512i>(r), 0));
}

// --- conversions
EMULATED __m512i cvtps_epi32(__m512 a) {
  Lanes<float> x = lanes<float>(a);
  Lanes<int32_t> r;
  for (int i = 0; i < 16; i += 8)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(r.lane + i), _mm256_cvtps_epi32(_mm256_loadu_ps(x.lane + i)));
  return pack<__m512i>(r);
}
EMULATED __m512 cvtepi32_ps(__m512i a) {
  Lanes<int32_t> x = lanes<int32_t>(a);
  Lanes<float> r;
  for (int i = 0; i < 16; i++) r.lane[i] = static_cast<float>(x.lane[i]);
  return pack<__m512>(r);
}
template <class From>
EMULATED __m512i widened(const void* from) {
  From x[16];
  std::memcpy(x, from, sizeof x);
  Lanes<int32_t> r;
  for (int i = 0; i < 16; i++) r.lane[i] = x[i];
  return pack<__m512i>(r);
}
EMULATED __m512i cvtepu16_epi32(__m256i a) { return widened<uint16_t>(&a); }
EMULATED __m512i cvtepi16_epi32(__m256i a) { return widened<int16_t>(&a); }
EMULATED __m512i cvtepu8_epi32(__m128i a) { return widened<uint8_t>(&a); }
EMULATED __m512i cvtepi8_epi32(__m128i a) { return widened<int8_t>(&a); }
EMULATED __m256i cvtepi32_epi16(__m512i a) {
  Lanes<int32_t> x = lanes<int32_t>(a);
  int16_t r[16];
  for (int i = 0; i < 16; i++) r[i] = static_cast<int16_t>(x.lane[i]);
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(r));
}
EMULATED __m128i cvtepi32_epi8(__m512i a) {
  Lanes<int32_t> x = lanes<int32_t>(a);
  int8_t r[16];
  for (int i = 0; i < 16; i++) r[i] = static_cast<int8_t>(x.lane[i]);
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(r));
}
EMULATED __m128i cvtusepi32_epi8(__m512i a) {  // unsigned saturation
  Lanes<uint32_t> x = lanes<uint32_t>(a);
  uint8_t r[16];
  for (int i = 0; i < 16; i++) r[i] = static_cast<uint8_t>(x.lane[i] > 255 ? 255 : x.lane[i]);
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(r));
}
EMULATED __m512 cvtph_ps(__m256i a) {
  Lanes<float> r;
  _mm256_storeu_ps(r.lane, _mm256_cvtph_ps(_mm256_castsi256_si128(a)));
  _mm256_storeu_ps(r.lane + 8, _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)));
  return pack<__m512>(r);
}
EMULATED __m256i cvtps_ph(__m512 a, int) {  // to nearest, ties to even: the only rounding that csrc asks for
  Lanes<float> x = lanes<float>(a);
  __m128i low = _mm256_cvtps_ph(_mm256_loadu_ps(x.lane), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m128i high = _mm256_cvtps_ph(_mm256_loadu_ps(x.lane + 8), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm256_set_m128i(high, low);
}

EMULATED __m512 permute_ps(__m512 a, int order) {  // within each four lanes
  Lanes<float> x = lanes<float>(a), r{};
  for (int i = 0; i < 16; i++) r.lane[i] = x.lane[(i & ~3) + (order >> 2 * (i & 3) & 3)];
  return pack<__m512>(r);
}

// --- masks
EMULATED __m512 mask_blend_ps(__mmask16 m, __m512 a, __m512 b) {
  Lanes<float> x = lanes<float>(a), y = lanes<float>(b);
  for (int i = 0; i < 16; i++) x.lane[i] = m >> i & 1 ? y.lane[i] : x.lane[i];
  return pack<__m512>(x);
}
EMULATED __m512i mask_blend_epi32(__mmask16 m, __m512i a, __m512i b) {
  return bits<__m512i>(mask_blend_ps(m, bits<__m512>(a), bits<__m512>(b)));
}
EMULATED __m512i mask_or_epi32(__m512i source, __mmask16 m, __m512i a, __m512i b) {
  return mask_blend_epi32(m, source, or_si512(a, b));
}
template <class F>
EMULATED __mmask16 test_lanes(__m512 a, __m512 b, F f) {
  Lanes<float> x = lanes<float>(a), y = lanes<float>(b);
  unsigned m = 0;
  for (int i = 0; i < 16; i++) m |= static_cast<unsigned>(f(x.lane[i], y.lane[i])) << i;
  return static_cast<__mmask16>(m);
}
EMULATED __mmask16 cmp_ps_mask(__m512 a, __m512 b, int predicate) {
  return test_lanes(a, b, [predicate](float x, float y) {
    switch (predicate) {
      case _CMP_UNORD_Q:
        return x != x || y != y;
      case _CMP_EQ_OQ:
        return x == y;
      case _CMP_NEQ_UQ:
        return !(x == y);
      case _CMP_LT_OQ:
        return x < y;
      case _CMP_LE_OQ:
        return x <= y;
      case _CMP_GT_OQ:
        return x > y;
      case _CMP_GE_OQ:
        return x >= y;
      case _CMP_NLT_UQ:
        return !(x < y);
      default:
        __builtin_trap();
    }
  });
}
EMULATED __mmask16 test_epi32_mask(__m512i a, __m512i b) {
  Lanes<int32_t> x = lanes<int32_t>(a), y = lanes<int32_t>(b);
  unsigned mask = 0;
  for (int i = 0; i < 16; i++) mask |= static_cast<unsigned>((x.lane[i] & y.lane[i]) != 0) << i;
  return static_cast<__mmask16>(mask);
}
EMULATED __mmask16 test_epi8_mask(__m128i a, __m128i b) {
  return static_cast<__mmask16>(~_mm_movemask_epi8(_mm_cmpeq_epi8(_mm_and_si128(a, b), _mm_setzero_si128())));
}
template <class T, class V>
EMULATED V masked_load(unsigned long long m, const void* p) {
  T x[sizeof(V) / sizeof(T)] = {};
  for (size_t i = 0; i < sizeof(V) / sizeof(T); i++)
    if (m >> i & 1) std::memcpy(x + i, static_cast<const T*>(p) + i, sizeof(T));
  V v;
  std::memcpy(&v, x, sizeof v);
  return v;
}
template <class T, class V>
EMULATED void masked_store(void* p, unsigned long long m, V v) {
  T x[sizeof(V) / sizeof(T)];
  std::memcpy(x, &v, sizeof x);
  for (size_t i = 0; i < sizeof(V) / sizeof(T); i++)
    if (m >> i & 1) std::memcpy(static_cast<T*>(p) + i, x + i, sizeof(T));
}
EMULATED __m512 maskz_loadu_ps(__mmask16 m, const void* p) {
  return bits<__m512>(masked_load<uint32_t, __m512i>(m, p));
}
EMULATED __m512i maskz_loadu_epi32(__mmask16 m, const void* p) { return masked_load<uint32_t, __m512i>(m, p); }
EMULATED __m512i maskz_loadu_epi8(__mmask64 m, const void* p) { return masked_load<uint8_t, __m512i>(m, p); }
EMULATED __m256i maskz_loadu_epi16_256(__mmask16 m, const void* p) { return masked_load<uint16_t, __m256i>(m, p); }
EMULATED __m128i maskz_loadu_epi8_128(__mmask16 m, const void* p) { return masked_load<uint8_t, __m128i>(m, p); }
EMULATED void mask_storeu_ps(void* p, __mmask16 m, __m512 a) { masked_store<uint32_t>(p, m, a); }
EMULATED void mask_storeu_epi32(void* p, __mmask16 m, __m512i a) { masked_store<uint32_t>(p, m, a); }
EMULATED void mask_storeu_epi16_256(void* p, __mmask16 m, __m256i a) { masked_store<uint16_t>(p, m, a); }
EMULATED void mask_storeu_epi8_128(void* p, __mmask16 m, __m128i a) { masked_store<uint8_t>(p, m, a); }

// --- memory
EMULATED __m512 loadu_ps(const void* p) {
  __m512 a;
  std::memcpy(&a, p, 64);
  return a;
}
EMULATED __m512i loadu_si512(const void* p) {
  __m512i a;
  std::memcpy(&a, p, 64);
  return a;
}
template <class V>
EMULATED void storeu(void* p, V a) {
  std::memcpy(p, &a, 64);
}
// The aligned forms trap on a misaligned address, as the hardware does.
EMULATED const void* aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 64) __builtin_trap();
  return p;
}
template <class V>
EMULATED void store_aligned(void* p, V a) {
  storeu(const_cast<void*>(aligned(p)), a);
}

// --- permutations
template <class From, class To>
EMULATED __m512i packs(__m512i a, __m512i b) {  // saturated, within each 128-bit quarter: those of a, then those of b
  constexpr int n = 16 / sizeof(From);
  Lanes<From> x = lanes<From>(a), y = lanes<From>(b);
  Lanes<To> r;
  auto cut_off = [](From v) {
    constexpr int32_t least = std::numeric_limits<To>::min(), most = std::numeric_limits<To>::max();
    return static_cast<To>(v < least ? least : v > most ? most : v);
  };
  for (int q = 0; q < 4; q++)
    for (int i = 0; i < n; i++) {
      r.lane[2 * n * q + i] = cut_off(x.lane[n * q + i]);
      r.lane[2 * n * q + n + i] = cut_off(y.lane[n * q + i]);
    }
  return pack<__m512i>(r);
}
EMULATED __m512i permutexvar_epi32(__m512i order, __m512i a) {
  Lanes<uint32_t> from = lanes<uint32_t>(order), x = lanes<uint32_t>(a), r;
  for (int i = 0; i < 16; i++) r.lane[i] = x.lane[from.lane[i] % 16];
  return pack<__m512i>(r);
}
template <class T, bool High>
EMULATED __m512i unpack(__m512i a, __m512i b) {  // within each 128-bit quarter
  constexpr int quarter = 16 / sizeof(T), half = quarter / 2;
  Lanes<T> x = lanes<T>(a), y = lanes<T>(b), r;
  for (int q = 0; q < 4; q++)
    for (int i = 0; i < half; i++) {
      int from = q * quarter + (High ? half : 0) + i;
      r.lane[q * quarter + 2 * i] = x.lane[from];
      r.lane[q * quarter + 2 * i + 1] = y.lane[from];
    }
  return pack<__m512i>(r);
}
EMULATED __m512i shuffle_i32x4(__m512i a, __m512i b, int control) {  // quarters: two of a, then two of b
  struct Quarters {
    char quarter[4][16];
  };
  Quarters x = bits<Quarters>(a), y = bits<Quarters>(b), r;
  for (int q = 0; q < 4; q++) std::memcpy(r.quarter[q], (q < 2 ? x : y).quarter[control >> 2 * q & 3], 16);
  return bits<__m512i>(r);
}

#undef EMULATED
}  // namespace emulated

#define _mm512_abs_ps emulated::abs_ps
#define _mm512_add_epi32 emulated::add_epi32
#define _mm512_add_ps emulated::add_ps
#define _mm512_and_si512 emulated::and_si512
#define _mm512_castps512_ps256 emulated::castps512_ps256
#define _mm512_castps_si512 emulated::castps_si512
#define _mm512_castsi256_si512 emulated::castsi256_si512
#define _mm512_castsi512_ps emulated::castsi512_ps
#define _mm512_castsi512_si256 emulated::castsi512_si256
#define _mm512_cmp_ps_mask emulated::cmp_ps_mask
#define _mm512_cvtepi16_epi32 emulated::cvtepi16_epi32
#define _mm512_cvtepi32_epi16 emulated::cvtepi32_epi16
#define _mm512_cvtepi32_epi8 emulated::cvtepi32_epi8
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#define _mm512_cvtepi8_epi32 emulated::cvtepi8_epi32
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtepu8_epi32 emulated::cvtepu8_epi32
#define _mm512_cvtne2ps_pbh(high, low)                                                                    \
  emulated::inserti64x4(emulated::castsi256_si512(reinterpret_cast<__m256i>(emulated::cvtneps_pbh(low))), \
                        reinterpret_cast<__m256i>(emulated::cvtneps_pbh(high)), 1)
#define _mm512_cvtneps_pbh emulated::cvtneps_pbh
#define _mm512_cvtph_ps emulated::cvtph_ps
#define _mm512_cvtps_epi32 emulated::cvtps_epi32
#define _mm512_cvtps_ph emulated::cvtps_ph
#define _mm512_cvtusepi32_epi8 emulated::cvtusepi32_epi8
#define _mm512_div_ps emulated::div_ps
#define _mm256_dpbf16_ps emulated::dpbf16_ps
#define _mm512_dpbf16_ps emulated::dpbf16_ps
#define _mm512_dpbusd_epi32 emulated::dpbusd_epi32
#define _mm512_extractf32x8_ps emulated::extractf32x8_ps
#define _mm512_extracti64x4_epi64 emulated::extracti64x4_epi64
#define _mm512_fmadd_ps emulated::fmadd_ps
#define _mm512_fmsub_ps emulated::fmsub_ps
#define _mm512_fnmadd_ps emulated::fnmadd_ps
#define _mm512_inserti64x4 emulated::inserti64x4
#define _mm512_load_ps(p) emulated::loadu_ps(emulated::aligned(p))
#define _mm512_load_si512(p) emulated::loadu_si512(emulated::aligned(p))
#define _mm512_loadu_ps emulated::loadu_ps
#define _mm512_loadu_si512 emulated::loadu_si512
#define _mm512_mask_blend_epi32 emulated::mask_blend_epi32
#define _mm512_mask_blend_ps emulated::mask_blend_ps
#define _mm512_mask_or_epi32 emulated::mask_or_epi32
#define _mm512_mask_storeu_epi32 emulated::mask_storeu_epi32
#define _mm512_mask_storeu_ps emulated::mask_storeu_ps
#define _mm512_maskz_loadu_epi32 emulated::maskz_loadu_epi32
#define _mm512_maskz_loadu_epi8 emulated::maskz_loadu_epi8
#define _mm512_maskz_loadu_ps emulated::maskz_loadu_ps
#define _mm512_max_epi32 emulated::max_epi32
#define _mm512_max_ps emulated::max_ps
#define _mm512_min_epi32 emulated::min_epi32
#define _mm512_min_ps emulated::min_ps
#define _mm512_mul_ps emulated::mul_ps
#define _mm512_mullo_epi32 emulated::mullo_epi32
#define _mm512_or_si512 emulated::or_si512
#define _mm512_reduce_add_epi32 emulated::reduce_add_epi32
#define _mm512_reduce_add_ps emulated::reduce_add_ps
#define _mm512_reduce_max_ps emulated::reduce_max_ps
#define _mm512_reduce_min_ps emulated::reduce_min_ps
#define _mm512_packs_epi16 emulated::packs<int16_t, int8_t>
#define _mm512_packs_epi32 emulated::packs<int32_t, int16_t>
#define _mm512_packus_epi16 emulated::packs<int16_t, uint8_t>
#define _mm512_permutexvar_epi32 emulated::permutexvar_epi32
#define _mm512_set1_epi16 emulated::set1_epi16
#define _mm512_set1_epi32 emulated::set1_epi32
#define _mm512_permute_ps emulated::permute_ps
#define _mm512_set1_epi8 emulated::set1_epi8
#define _mm512_set1_ps emulated::set1_ps
#define _mm512_setzero_ps emulated::setzero_ps
#define _mm512_setzero_si512 emulated::setzero_si512
#define _mm512_shuffle_i32x4 emulated::shuffle_i32x4
#define _mm512_slli_epi32 emulated::slli_epi32
#define _mm512_sqrt_ps emulated::sqrt_ps
#define _mm512_srai_epi32 emulated::srai_epi32
#define _mm512_srli_epi32 emulated::srli_epi32
#define _mm512_store_ps emulated::store_aligned
#define _mm512_store_si512 emulated::store_aligned
#define _mm512_storeu_ps emulated::storeu
#define _mm512_storeu_si512 emulated::storeu
#define _mm512_sub_epi32 emulated::sub_epi32
#define _mm512_sub_ps emulated::sub_ps
#define _mm512_unpackhi_epi16 emulated::unpack<uint16_t, true>
#define _mm512_unpacklo_epi16 emulated::unpack<uint16_t, false>
#define _mm512_unpackhi_epi32 emulated::unpack<uint32_t, true>
#define _mm512_unpackhi_epi64 emulated::unpack<uint64_t, true>
#define _mm512_unpacklo_epi32 emulated::unpack<uint32_t, false>
#define _mm512_unpacklo_epi64 emulated::unpack<uint64_t, false>
#define _mm512_xor_si512 emulated::xor_si512
#define _mm256_mask_storeu_epi16 emulated::mask_storeu_epi16_256
#define _mm256_maskz_loadu_epi16 emulated::maskz_loadu_epi16_256
#define _mm_mask_storeu_epi8 emulated::mask_storeu_epi8_128
#define _mm_maskz_loadu_epi8 emulated::maskz_loadu_epi8_128
#define _mm512_test_epi32_mask emulated::test_epi32_mask
#define _mm_test_epi8_mask emulated::test_epi8_mask
