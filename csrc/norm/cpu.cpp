// LayerNorm and RMSNorm for the CPU, forward; compiled once per instruction set.
//
// A row is read from memory once: the passes after the first find it in the first-level cache.
#include <cstddef>

#include "../common/parallel.h"
#include "params.h"
#include "row.h"

namespace llmkern::LLMKERN_ISA {
namespace {

struct Moments {
  float mean, scale;
};

template <class T>
Moments moments(const T* row, int64_t width, float eps, bool centred) {
  const float n = static_cast<float>(width);
  if (!centred) {
    float squares = sum_over(width, [&](int64_t d, int count) {
      Float x = load_some(row + d, count);
      return mul(x, x);
    });
    return {0.0f, 1.0f / __builtin_sqrtf(squares / n + eps)};
  }
  float mean = sum_over(width, [&](int64_t d, int count) { return load_some(row + d, count); }) / n;
  // The mean is rounded: what remains of the sum of differences says by how much (Chan, Golub and LeVeque 1983, the
  // corrected two-pass algorithm).
  Float centre = broadcast(mean), rest = zero();
  float squares = sum_over(width, [&](int64_t d, int count) {
    Float x = sub(load_some(row + d, count), centre);
    if (count < kWidth) x = first(count, x, zero());
    rest = add(rest, x);
    return mul(x, x);
  });
  float off = sum(rest) / n;
  float variance = squares / n - off * off;
  return {mean + off, 1.0f / __builtin_sqrtf((variance > 0.0f || variance != variance ? variance : 0.0f) + eps)};
}

template <class T>
void add_residual(const T* x, const T* residual, T* total, int64_t width) {
  for_each_vector(
      width, [&](int64_t d, int n) { store_some(total + d, add(load_some(x + d, n), load_some(residual + d, n)), n); });
}

template <class T, class W>
void rows(const NormParams& p, int64_t begin, int64_t end) {
  const Factors<W> factors = {static_cast<const W*>(p.weight), broadcast(p.offset)};
  const W* bias = static_cast<const W*>(p.bias);
  for (int64_t i = begin; i < end; i++) {
    const T* row = static_cast<const T*>(p.x) + i * p.x_stride;
    T* out = static_cast<T*>(p.out) + i * p.width;
    if (p.residual) {
      T* total = static_cast<T*>(p.total) + i * p.width;
      add_residual(row, static_cast<const T*>(p.residual) + i * p.residual_stride, total, p.width);
      row = total;
    }
    const Moments m = moments(row, p.width, p.eps, p.centred);
    p.statistics[2 * i] = m.mean, p.statistics[2 * i + 1] = m.scale;
    const Float mean = broadcast(m.mean), scale = broadcast(m.scale);
    for_each_vector(p.width, [&](int64_t d, int n) {
      Float y = mul(mul(sub(load_some(row + d, n), mean), scale), factors.at(d, n));
      store_some(out + d, bias ? add(y, load_some(bias + d, n)) : y, n);
    });
  }
}

}  // namespace

void norm(const NormParams& p) {
  auto body = [&](int thread, int threads) {
    const Range range = share(p.rows, 1, thread, threads);
    with_types(p.dtype, p.weight_dtype,
               [&](auto x, auto w) { rows<decltype(x), decltype(w)>(p, range.begin, range.end); });
  };
  parallel(p.rows * p.width < 32768 ? 1 : p.threads, body);
}

}  // namespace llmkern::LLMKERN_ISA
