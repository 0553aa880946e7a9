// The gradients of LayerNorm and RMSNorm for the CPU; compiled once per instruction set.
//
// With y the normalised row and g = grad * factors: dx = (g - mean(g) - y mean(g y)) * scale, without mean(g) where the
// row is not centred. The gradients of weight and bias are sums over all rows: each chunk of rows has sums of its own,
// whose number depends on the rows alone, so that the result does not depend on the number of threads.
#include <cstddef>

#include "../common/parallel.h"
#include "params.h"
#include "row.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int kRows = 4;  // whose sums over columns are taken together, from registers

template <class T>
struct Row {
  const T *grad, *grad_total, *total;
  T* dx;
  Float mean, scale, of_grad, of_product;  // statistics; means of g and of g y
};

template <class T, class W>
Row<T> look(const NormBackwardParams& p, const Factors<W>& factors, int64_t i) {
  Row<T> r;
  r.grad = static_cast<const T*>(p.grad) + i * p.grad_stride;
  r.grad_total = p.grad_total ? static_cast<const T*>(p.grad_total) + i * p.grad_total_stride : nullptr;
  r.total = static_cast<const T*>(p.total) + i * p.total_stride;
  r.dx = static_cast<T*>(p.dx) + i * p.width;
  r.mean = broadcast(p.statistics[2 * i]), r.scale = broadcast(p.statistics[2 * i + 1]);
  Float grads = zero();
  // The gradient is 0 behind the row's end, and what it is multiplied by finite there but for a row that is not.
  float products = sum_over(p.width, [&](int64_t d, int n) {
    Float g = mul(load_some(r.grad + d, n), factors.at(d, n));
    grads = add(grads, g);
    Float y = mul(sub(load_some(r.total + d, n), r.mean), r.scale);
    if (n < kWidth) y = first(n, y, zero());
    return mul(g, y);
  });
  const float n = static_cast<float>(p.width);
  r.of_grad = broadcast(p.centred ? sum(grads) / n : 0.0f), r.of_product = broadcast(products / n);
  return r;
}

template <class T, class W, int N>
void write(const NormBackwardParams& p, const Factors<W>& factors, const Row<T>* rows, float* weight_sums,
           float* bias_sums) {
  for_each_vector(p.width, [&](int64_t d, int n) {
    const Float factor = factors.at(d, n);
    Float of_weight = zero(), of_bias = zero();
    for (int i = 0; i < N; i++) {
      const Row<T>& r = rows[i];
      Float grad = load_some(r.grad + d, n);
      Float y = mul(sub(load_some(r.total + d, n), r.mean), r.scale);
      of_weight = fma(grad, y, of_weight), of_bias = add(of_bias, grad);
      Float dx = mul(sub(sub(mul(grad, factor), r.of_grad), mul(y, r.of_product)), r.scale);
      if (r.grad_total) dx = add(dx, load_some(r.grad_total + d, n));
      store_some(r.dx + d, dx, n);
    }
    if (weight_sums) store_some(weight_sums + d, add(load_some(weight_sums + d, n), of_weight), n);
    if (bias_sums) store_some(bias_sums + d, add(load_some(bias_sums + d, n), of_bias), n);
  });
}

void clear(float* sums, int64_t width) {
  if (sums) for_each_vector(width, [&](int64_t d, int n) { store_some(sums + d, zero(), n); });
}

template <class T, class W>
void chunk(const NormBackwardParams& p, int64_t number) {
  const Factors<W> factors = {static_cast<const W*>(p.weight), broadcast(p.offset)};
  float* weight_sums = p.weight_sums ? p.weight_sums + number * p.width : nullptr;
  float* bias_sums = p.bias_sums ? p.bias_sums + number * p.width : nullptr;
  clear(weight_sums, p.width), clear(bias_sums, p.width);
  int64_t i = number * p.chunk_rows, end = i + p.chunk_rows < p.rows ? i + p.chunk_rows : p.rows;
  Row<T> rows[kRows];
  for (; i + kRows <= end; i += kRows) {
    for (int j = 0; j < kRows; j++) rows[j] = look<T>(p, factors, i + j);
    write<T, W, kRows>(p, factors, rows, weight_sums, bias_sums);
  }
  for (; i < end; i++) {
    rows[0] = look<T>(p, factors, i);
    write<T, W, 1>(p, factors, rows, weight_sums, bias_sums);
  }
}

}  // namespace

void norm_backward(const NormBackwardParams& p) {
  Counter counter;
  auto body = [&](int, int) {
    for (int64_t number; (number = counter.take()) < p.chunks;)
      with_types(p.dtype, p.weight_dtype, [&](auto x, auto w) { chunk<decltype(x), decltype(w)>(p, number); });
  };
  parallel(p.rows * p.width < 32768 ? 1 : p.threads, body);
}

}  // namespace llmkern::LLMKERN_ISA
