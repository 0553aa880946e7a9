// What the losses know of rows: sums of exponentials relative to their maximum, and how those of parts combine.
#pragma once
#include "../common/exp.h"
#include "../common/row.h"
#include "params.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();

// What is subtracted before exponentials are taken: the maximum, but 0 where all are -infinity.
LLMKERN_INLINE Float shift_of(Float maximum) {
  return where_equal(maximum, broadcast(-kInfinity), zero(), maximum);
}

// e^(x - m) for x <= m; 1 where both are the same infinity, which is where a sum of 1 or more stands for it.
LLMKERN_INLINE Float factor_of(Float x, Float m) {
  return where_equal(x, m, broadcast(1.0f), exp_negative(sub(x, m)));
}

// The log-sum-exp of numbers whose maximum is m and whose sum of e^(x - m) is `sum`: m where that is infinite, unless
// a number is NaN.
LLMKERN_INLINE float log_sum(float m, float sum, bool nan) {
  if (nan) return __builtin_nanf("");
  return m == kInfinity || m == -kInfinity ? m : m + __builtin_logf(sum);
}

// The factors of the gradient of a row's logits: scale * e^(x - lse) - shift, and less `hit` at the target.
struct Slope {
  float scale, shift, hit;
};
LLMKERN_INLINE Slope slope_of(const LossRule& rule, float grad, float lse, int64_t target, int64_t vocabulary) {
  if (target == rule.ignore_index) return {};
  const float s = rule.smoothing, z = rule.z_loss;
  if (target < 0 || target >= vocabulary) return {__builtin_nanf(""), 0, 0};
  return {z == 0.0f ? grad : grad * (1.0f + 2.0f * z * lse), grad * s / static_cast<float>(vocabulary),
          grad * (1.0f - s)};
}

// at_target: the target's logit; total: the sum of all where the rule smooths.
LLMKERN_INLINE float loss_of(const LossRule& rule, float lse, float at_target, float total, int64_t target,
                             int64_t vocabulary) {
  if (target == rule.ignore_index) return 0.0f;
  const float s = rule.smoothing;
  float loss = lse - at_target;
  if (s != 0.0f) loss = lse - ((1.0f - s) * at_target + s * (total / static_cast<float>(vocabulary)));
  return rule.z_loss == 0.0f ? loss : loss + rule.z_loss * lse * lse;
}

// Calls f with a value of the element type.
template <class F>
LLMKERN_INLINE void with_type(DType dtype, F f) {
  if (dtype == DType::bf16) return f(Bf16{});
  if (dtype == DType::f16) return f(Fp16{});
  f(float{});
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
