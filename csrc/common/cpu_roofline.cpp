// The rates that no kernel beats: multiply-adds from registers, and reads. Compiled once per instruction set, with the
// same vector operations that the kernels use.
#include "parallel.h"
#include "roofline.h"
#include "simd.h"
#include "tile_configuration.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int kChains = 12;  // independent sums: latency times throughput of any processor here, and two operands fit

// Makes the compiler forget what it knows of a register, so that nothing moves out of the loop.
template <class V>
LLMKERN_INLINE void opaque(V& v) {
#if defined(__x86_64__) && !defined(LLMKERN_EMULATE_AVX512)
  asm volatile("" : "+x"(v));
#elif defined(__aarch64__)
  asm volatile("" : "+w"(v));
#else  // emulated, a register is memory
  asm volatile("" : "+m"(v));
#endif
}

LLMKERN_INLINE float lane_zero(Float v) {
  alignas(64) float x[kWidth];
  store(x, v);
  return x[0];
}

// One instruction's worth of 8-bit multiply-adds into 32-bit sums, the fastest that the instruction set has.
#if defined(__AVX512VNNI__)
using Bytes = __m512i;
constexpr int kByteProducts = 64;
LLMKERN_INLINE Bytes dot_bytes(Bytes acc, Bytes a, Bytes b) { return _mm512_dpbusd_epi32(acc, a, b); }
#elif defined(__AVXVNNI__)
using Bytes = __m256i;
constexpr int kByteProducts = 32;
LLMKERN_INLINE Bytes dot_bytes(Bytes acc, Bytes a, Bytes b) { return _mm256_dpbusd_avx_epi32(acc, a, b); }
#elif defined(__ARM_FEATURE_DOTPROD)
using Bytes = int32x4_t;
constexpr int kByteProducts = 16;
LLMKERN_INLINE Bytes dot_bytes(Bytes acc, Bytes a, Bytes b) {
  return vdotq_s32(acc, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b));
}
#elif defined(__AVX2__)
using Bytes = __m256i;
constexpr int kByteProducts = 32;
LLMKERN_INLINE Bytes dot_bytes(Bytes acc, Bytes a, Bytes b) {
  __m256i pairs = _mm256_maddubs_epi16(a, b);
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#else
typedef int32_t Bytes __attribute__((vector_size(16)));
constexpr int kByteProducts = 4;
LLMKERN_INLINE Bytes dot_bytes(Bytes acc, Bytes a, Bytes b) { return acc + a * b; }
#endif

float fp32_chains(int64_t repeats) {
  Float acc[kChains], a = broadcast(0.5f), b = broadcast(1.0f);
  for (int i = 0; i < kChains; i++) acc[i] = broadcast(static_cast<float>(i));
  for (int64_t r = 0; r < repeats; r++) {
    opaque(a);
    opaque(b);
    for (int i = 0; i < kChains; i++) acc[i] = fma(acc[i], a, b);
  }
  for (int i = 1; i < kChains; i++) acc[0] = add(acc[0], acc[i]);
  return lane_zero(acc[0]);
}

float bf16_chains(int64_t repeats) {
  Float acc[kChains];
  Int a = broadcast_int(0x3f803f80), b = broadcast_int(0x37803780);
  for (int i = 0; i < kChains; i++) acc[i] = broadcast(static_cast<float>(i));
  for (int64_t r = 0; r < repeats; r++) {
    opaque(a);
    opaque(b);
    for (int i = 0; i < kChains; i++) acc[i] = dot_bf16(acc[i], a, b);
  }
  for (int i = 1; i < kChains; i++) acc[0] = add(acc[0], acc[i]);
  return lane_zero(acc[0]);
}

#ifdef __AMX_INT8__
// Multiplies of whole tiles: `kTileProducts` operations each, four of them in a repeat.
constexpr double kTileProducts = 2.0 * 16 * 16 * 64;
float int8_chains(int64_t repeats) {
  _tile_loadconfig(&kFullTiles);
  for (int64_t r = 0; r < repeats; r++) {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  _tile_release();
  return 0.0f;
}
#else
float int8_chains(int64_t repeats) {
  Bytes acc[kChains] = {}, a = {}, b = {};
  for (int i = 0; i < kChains; i++) opaque(acc[i]);  // equal chains would become one
  for (int64_t r = 0; r < repeats; r++) {
    opaque(a);
    opaque(b);
    for (int i = 0; i < kChains; i++) acc[i] = dot_bytes(acc[i], a, b);
  }
  for (int i = 0; i < kChains; i++) opaque(acc[i]);
  return 0.0f;
}
#endif

float read_block(const float* data, int64_t count) {
  Float acc[8];
  for (int i = 0; i < 8; i++) acc[i] = zero();
  int64_t at = 0;
  for (; at + 8 * kWidth <= count; at += 8 * kWidth)
    for (int i = 0; i < 8; i++) acc[i] = add(acc[i], load(data + at + i * kWidth));
  for (int i = 1; i < 8; i++) acc[0] = add(acc[0], acc[i]);
  return lane_zero(acc[0]);
}

}  // namespace

void roofline(const RooflineParams& p) {
  int used = 1;
  auto body = [&](int thread, int threads) {
    float result = 0.0f;
    if (thread == 0) used = threads;
    switch (p.kind) {
      case Roofline::fp32:
        result = fp32_chains(p.repeats);
        break;
      case Roofline::bf16:
        result = bf16_chains(p.repeats);
        break;
      case Roofline::int8:
        result = int8_chains(p.repeats);
        break;
      case Roofline::read: {
        Range part = share(p.bytes / 4, 128, thread, threads);
        for (int64_t r = 0; r < p.repeats; r++) {
          result += read_block(p.data + part.begin, part.end - part.begin);
          asm volatile("" : : : "memory");  // the next reading is another one
        }
        break;
      }
    }
    p.sink[thread] = result;
  };
  parallel(p.threads, body);
  const double chains = 2.0 * kChains * static_cast<double>(p.repeats) * used;
  switch (p.kind) {
    case Roofline::fp32:
      *p.work = chains * kWidth;
      break;
    case Roofline::bf16:
      *p.work = chains * kWidth * 2;
      break;
    case Roofline::int8:
#ifdef __AMX_INT8__
      *p.work = 4 * kTileProducts * static_cast<double>(p.repeats) * used;
#else
      *p.work = chains * kByteProducts;
#endif
      break;
    case Roofline::read:
      *p.work = static_cast<double>(p.bytes) * static_cast<double>(p.repeats);
      break;
  }
}

}  // namespace llmkern::LLMKERN_ISA
