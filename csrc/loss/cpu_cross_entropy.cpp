// Cross-entropy of logits for the CPU, forward and backward; compiled once per instruction set. Each reads a row from
// memory once.
#include "row.h"

namespace llmkern::LLMKERN_ISA {
namespace {

template <class T>
void forward(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; r++) {
    const int64_t t = p.targets[r];
    p.loss[r] = 0.0f, p.lse[r] = 0.0;
    if (t == p.rule.ignore_index) continue;
    const T* row = static_cast<const T*>(p.logits) + r * p.stride;
    auto at = [&](int64_t d, int n) { return load_logits(row + d, n); };
    const Part all = p.rule.smoothing != 0.0f ? whole_row<true>(p.vocabulary, at) : whole_row<false>(p.vocabulary, at);
    const double m = all.maximum, logarithm = log_sum(m, all.sum);
    const double x = t >= 0 && t < p.vocabulary ? load_one(row + t) : __builtin_nan("");
    p.loss[r] = loss_of(p.rule, m, logarithm, x, all.total / static_cast<double>(p.vocabulary) - m);
    p.lse[r] = together(m, logarithm);
  }
}

template <class T>
void backward(const CrossEntropyBackwardParams& p, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; r++) {
    const T* row = static_cast<const T*>(p.logits) + r * p.stride;
    T* out = static_cast<T*>(p.out) + r * p.vocabulary;
    const int64_t t = p.targets[r];
    const Slope s = slope_of(p.rule, p.grad[r], p.lse[r], t, p.vocabulary);
    const Lse lse = split(p.lse[r]);
    const Float high = broadcast(lse.high), low = broadcast(lse.low), even = broadcast(s.even);
    const Float of_z = broadcast(s.of_z), grad = broadcast(s.grad);
    const float at_target = t >= 0 && t < p.vocabulary ? slope_at_target(load_one(row + t), lse, s) : 0.0f;
    for_each_vector(p.vocabulary, [&](int64_t d, int n) {
      store_some(out + d, slope(probability(load_some(row + d, n), high, low), even, of_z, grad), n);
    });
    if (t >= 0 && t < p.vocabulary) store_one(out + t, at_target);
  }
}

}  // namespace

void cross_entropy(const CrossEntropyParams& p) {
  over_rows(p, [&](int64_t begin, int64_t end) {
    with_type(p.dtype, [&](auto element) { forward<decltype(element)>(p, begin, end); });
  });
}

void cross_entropy_backward(const CrossEntropyBackwardParams& p) {
  over_rows(p, [&](int64_t begin, int64_t end) {
    with_type(p.dtype, [&](auto element) { backward<decltype(element)>(p, begin, end); });
  });
}

}  // namespace llmkern::LLMKERN_ISA
