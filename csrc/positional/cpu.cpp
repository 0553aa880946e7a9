// The sinusoidal add for the CPU; compiled once per instruction set.
#include "../common/parallel.h"
#include "../common/simd.h"
#include "params.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int kGroups = 16;  // Philox blocks made together, in loops that the compiler turns into vectors

// Factors (0 or keep_scale) of the kGroups * 4 elements of a row from column `first` on, which 4 divides.
void dropout_factors(const SinusoidalAddParams& p, int64_t row, int64_t first, float* factors) {
  uint32_t c0[kGroups], c1[kGroups], c2[kGroups], c3[kGroups];
  for (int i = 0; i < kGroups; i++) {
    c0[i] = static_cast<uint32_t>(first / 4) + static_cast<uint32_t>(i);
    c1[i] = static_cast<uint32_t>(row);
    c2[i] = static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32);
    c3[i] = 0;
  }
  uint32_t k0 = static_cast<uint32_t>(p.seed), k1 = static_cast<uint32_t>(p.seed >> 32);
  for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    for (int i = 0; i < kGroups; i++) {
      uint64_t product0 = uint64_t{0xD2511F53u} * c0[i], product1 = uint64_t{0xCD9E8D57u} * c2[i];
      c0[i] = static_cast<uint32_t>(product1 >> 32) ^ c1[i] ^ k0;
      c1[i] = static_cast<uint32_t>(product1);
      c2[i] = static_cast<uint32_t>(product0 >> 32) ^ c3[i] ^ k1;
      c3[i] = static_cast<uint32_t>(product0);
    }
  }
  for (int i = 0; i < kGroups; i++) {
    factors[4 * i] = c0[i] < p.drop_below ? 0.0f : p.keep_scale;
    factors[4 * i + 1] = c1[i] < p.drop_below ? 0.0f : p.keep_scale;
    factors[4 * i + 2] = c2[i] < p.drop_below ? 0.0f : p.keep_scale;
    factors[4 * i + 3] = c3[i] < p.drop_below ? 0.0f : p.keep_scale;
  }
}

template <class T, bool kTable, bool kDropout>
void add_rows(const SinusoidalAddParams& p, int64_t begin, int64_t end) {
  constexpr int64_t kChunk = 4 * kGroups;
  static_assert(kChunk % kWidth == 0, "factors are read by whole vectors");
  Float scale = broadcast(p.scale);
  alignas(64) float factors[kChunk];
  for (int64_t row = begin; row < end; row++) {
    int64_t s = row / p.batch, b = row % p.batch;
    const T* x = static_cast<const T*>(p.x) + s * p.x_stride_s + b * p.x_stride_b;
    const float* pe = kTable ? p.pe + s * p.pe_stride_s : nullptr;
    T* out = static_cast<T*>(p.out) + s * p.out_stride_s + b * p.out_stride_b;
    for (int64_t first = 0; first < p.width; first += kDropout ? kChunk : p.width) {
      int64_t last = kDropout && first + kChunk < p.width ? first + kChunk : p.width, d = first;
      if (kDropout) dropout_factors(p, row, first, factors);
      for (; d + kWidth <= last; d += kWidth) {
        Float y = kTable ? fma(load(x + d), scale, load(pe + d)) : mul(load(x + d), scale);
        store(out + d, kDropout ? mul(y, load(factors + (d - first))) : y);
      }
      int n = static_cast<int>(last - d);
      if (n) {
        Float y = load_first(x + d, n);
        y = kTable ? fma(y, scale, load_first(pe + d, n)) : mul(y, scale);
        store_first(out + d, kDropout ? mul(y, load(factors + (d - first))) : y, n);
      }
    }
  }
}

template <class T>
void add_rows(const SinusoidalAddParams& p, int64_t begin, int64_t end) {
  bool dropout = p.drop_below != 0;
  if (p.pe && dropout) return add_rows<T, true, true>(p, begin, end);
  if (p.pe) return add_rows<T, true, false>(p, begin, end);
  if (dropout) return add_rows<T, false, true>(p, begin, end);
  return add_rows<T, false, false>(p, begin, end);
}

}  // namespace

void sinusoidal_add(const SinusoidalAddParams& p) {
  auto body = [&](int thread, int threads) {
    Range rows = share(p.length * p.batch, 16, thread, threads);
    switch (p.dtype) {
      case DType::bf16:
        return add_rows<Bf16>(p, rows.begin, rows.end);
      case DType::f16:
        return add_rows<Fp16>(p, rows.begin, rows.end);
      default:
        return add_rows<float>(p, rows.begin, rows.end);
    }
  };
  parallel(p.length * p.batch * p.width < 32768 ? 1 : p.threads, body);
}

}  // namespace llmkern::LLMKERN_ISA
