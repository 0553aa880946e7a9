// Positional kernels for the CPU; compiled once per instruction set.
#include "../common/parallel.h"
#include "../common/simd.h"
#include "params.h"

namespace llmkern::LLMKERN_ISA {
namespace {

template <class T>
void add_rows(const SinusoidalAddParams& p, int64_t begin, int64_t end) {
  Float scale = broadcast(p.scale);
  for (int64_t row = begin; row < end; row++) {
    int64_t s = row / p.batch, b = row % p.batch;
    const T* x = static_cast<const T*>(p.x) + s * p.x_stride_s + b * p.x_stride_b;
    const float* pe = p.pe + s * p.pe_stride_s;
    T* out = static_cast<T*>(p.out) + s * p.out_stride_s + b * p.out_stride_b;
    int64_t d = 0;
    for (; d + kWidth <= p.width; d += kWidth) store(out + d, fma(load(x + d), scale, load(pe + d)));
    int n = static_cast<int>(p.width - d);
    if (n) store_first(out + d, fma(load_first(x + d, n), scale, load_first(pe + d, n)), n);
  }
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
