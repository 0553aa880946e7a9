// What the losses know of rows: sums of exponentials relative to their maximum, and what gradients are made of.
#pragma once
#include "../common/exp.h"
#include "../common/parallel.h"
#include "../common/row.h"
#include "params.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();

// e^x for x <= 0; 0 where that is below every normal number, not the least of them: logits may lie so far apart that it
// would be seen, times their difference or times z_loss lse.
LLMKERN_INLINE Float exponential(Float x) {
  return where_less(x, broadcast(-87.3f), zero(), exp_negative<false, false>(x));
}

// What is subtracted before exponentials are taken: the maximum, but 0 where all are -infinity.
LLMKERN_INLINE Float shift_of(Float maximum) { return where_equal(maximum, broadcast(-kInfinity), zero(), maximum); }

// e^(x - m) for x <= m; 1 where both are the same infinity.
LLMKERN_INLINE Float factor_of(Float x, Float m) { return where_equal(x, m, broadcast(1.0f), exponential(sub(x, m))); }

// The logarithm of the sum of e^(x - maximum); NaN where the maximum is infinite.
LLMKERN_INLINE double log_sum(double maximum, double sum) {
  return maximum - maximum == 0.0 ? __builtin_log(sum) : __builtin_nan("");
}

// What a log-sum-exp's logarithm is multiplied by before it is added to the maximum: 1 for maxima up to 2^30. A double
// loses the logarithm beside larger ones, up to 1/4 of it at 2^53, all of it later, and with it the probabilities,
// which are 1 / n for n equal logits however large. Scaled, the logarithm, less than 32 since a row has fewer than 2^46
// classes, is less than half a unit of a float maximum, which is thus the sum's nearest float, and keeps 2^-23 or
// better.
LLMKERN_INLINE double scale_of(double maximum) {
  const double scale = __builtin_fabs(maximum) * 0x1p-30;
  return scale > 1.0 ? scale : 1.0;
}
LLMKERN_INLINE double together(double maximum, double logarithm) { return maximum + logarithm * scale_of(maximum); }

// The same in two floats, so that x - lse is rounded once, or x - maximum - logarithm.
struct Lse {
  float high, low;
};
LLMKERN_INLINE Lse split(double lse) {
  const float high = static_cast<float>(lse);
  return {high, static_cast<float>((lse - high) / scale_of(high))};
}
LLMKERN_INLINE Float probability(Float x, Float high, Float low) { return exponential(sub(sub(x, high), low)); }

// The gradient of a row's logits is ((p - even - hit at the target) + p * of_z) * grad, the small part of z last.
struct Slope {
  float grad, even, hit, of_z;
};
LLMKERN_INLINE Slope slope_of(const LossRule& rule, float grad, double lse, int64_t target, int64_t vocabulary) {
  if (target == rule.ignore_index) return {};
  if (target < 0 || target >= vocabulary) return {__builtin_nanf(""), 0, 0, 0};
  const float s = rule.smoothing, z = rule.z_loss;
  return {grad, s / static_cast<float>(vocabulary), 1.0f - s, z == 0.0f ? 0.0f : 2.0f * z * static_cast<float>(lse)};
}
LLMKERN_INLINE Float slope(Float p, Float even, Float of_z, Float grad) {
  const Float y = mul(fma(p, of_z, sub(p, even)), grad);
  return where_equal(grad, zero(), zero(), y);  // a row that does not count, whatever its logits are
}
LLMKERN_INLINE float slope_at_target(float x, Lse lse, const Slope& s) {
  alignas(64) float p[kWidth];
  store(p, probability(broadcast(x), broadcast(lse.high), broadcast(lse.low)));
  return s.grad == 0.0f ? 0.0f : (((p[0] - s.even) - s.hit) + p[0] * s.of_z) * s.grad;
}

// logarithm: of the sum of e^(x - maximum). at_target: the target's logit; mean: that of x - maximum.
LLMKERN_INLINE float loss_of(const LossRule& rule, double maximum, double logarithm, double at_target, double mean) {
  const double s = rule.smoothing, shifted = at_target - maximum, lse = maximum + logarithm;
  const double loss = logarithm - (s == 0.0 ? shifted : (1.0 - s) * shifted + s * mean);
  return static_cast<float>(rule.z_loss == 0.0f ? loss : loss + rule.z_loss * lse * lse);
}

// Maximum and sums of a row's part: of e^(x - shift) and, where asked for, of x - shift. f(column, count) gives x, with
// -infinity behind the end.
struct Part {
  float maximum, shift;
  double sum, total;
};
template <bool kTotal, class F>
LLMKERN_INLINE Part part_of(int64_t begin, int64_t end, F f) {
  Float m[4];
  for (int i = 0; i < 4; i++) m[i] = broadcast(-kInfinity);
  auto each = [&](auto g) {
    int64_t d = begin;
    for (; d + 4 * kWidth <= end; d += 4 * kWidth)
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) g(i, f(d + i * kWidth, kWidth), kWidth);
    for (; d < end; d += kWidth) {
      const int n = end - d < kWidth ? static_cast<int>(end - d) : kWidth;
      g(0, f(d, n), n);
    }
  };
  each([&](int i, Float x, int) { m[i] = max(x, m[i]); });  // the second where the first is NaN
  const float maximum = largest(max(max(m[0], m[1]), max(m[2], m[3])));
  const float less = maximum == -kInfinity ? 0.0f : maximum;
  const Float shift = broadcast(less);
  Float sums[4] = {zero(), zero(), zero(), zero()}, totals[4] = {zero(), zero(), zero(), zero()};
  each([&](int i, Float x, int n) {
    const Float y = sub(x, shift);
    sums[i] = add(sums[i], exponential(y));
    if constexpr (kTotal) totals[i] = add(totals[i], n < kWidth ? first(n, y, zero()) : y);
  });
  Part part = {maximum, less, sum(add(add(sums[0], sums[1]), add(sums[2], sums[3]))), 0.0};
  if constexpr (kTotal) part.total = sum(add(add(totals[0], totals[1]), add(totals[2], totals[3])));
  return part;
}

// A part of a row: it stays in the first-level cache while it is looked at twice.
constexpr int64_t kPart = 2048;

// The same of a whole row, its parts put together; total is then of x.
template <bool kTotal, class F>
LLMKERN_INLINE Part whole_row(int64_t width, F f) {
  Part all = {-kInfinity, 0.0f, 0.0, 0.0};
  for (int64_t d = 0; d < width; d += kPart) {
    const int64_t end = d + kPart < width ? d + kPart : width;
    const Part part = part_of<kTotal>(d, end, f);
    const double before = all.maximum, now = part.maximum, highest = before < now ? now : before;
    all.sum = all.sum * (before == highest ? 1.0 : __builtin_exp(before - highest)) +
              part.sum * (now == highest ? 1.0 : __builtin_exp(now - highest));
    all.maximum = static_cast<float>(highest);
    if (kTotal) all.total += part.total + static_cast<double>(end - d) * part.shift;
  }
  return all;
}

// n elements as floats, -infinity behind them.
template <class T>
LLMKERN_INLINE Float load_logits(const T* p, int n) {
  return n == kWidth ? load(p) : first(n, load_first(p, n), broadcast(-kInfinity));
}

// Calls f with a value of the element type.
template <class F>
LLMKERN_INLINE void with_type(DType dtype, F f) {
  if (dtype == DType::bf16) return f(Bf16{});
  if (dtype == DType::f16) return f(Fp16{});
  f(float{});
}

// Calls f(begin, end) for each thread's rows.
template <class Params, class F>
LLMKERN_INLINE void over_rows(const Params& p, F f) {
  auto body = [&](int thread, int threads) {
    const Range range = share(p.rows, 1, thread, threads);
    f(range.begin, range.end);
  };
  parallel(p.rows * p.vocabulary < 32768 ? 1 : p.threads, body);
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
