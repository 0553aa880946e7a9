// The sinusoidal add for the CPU; compiled once per instruction set.
#include "../common/parallel.h"
#include "../common/philox.h"
#include "../common/simd.h"
#include "params.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int64_t kChunk = 4 * kPhiloxGroups;  // elements whose factors are made together

// Factors (0 or keep_scale) of the kChunk elements of a row from column `first` on, which 4 divides.
void dropout_factors(const SinusoidalAddParams& p, int64_t row, int64_t first, float* factors) {
  uint32_t words[kChunk];
  philox(p.seed, static_cast<uint32_t>(first / 4), static_cast<uint32_t>(row),
         static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32), 0, words);
  for (int i = 0; i < kChunk; i++) factors[i] = words[i] < p.drop_below ? 0.0f : p.keep_scale;
}

template <class T, bool kTable, bool kDropout>
void add_rows(const SinusoidalAddParams& p, int64_t begin, int64_t end) {
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
