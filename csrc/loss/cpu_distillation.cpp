// The losses of distillation from logits for the CPU, forward and backward; compiled once per instruction set.
#include "row.h"

namespace llmkern::LLMKERN_ISA {
namespace {

// x / T: divided, as plain PyTorch does.
template <class T>
struct Tempered {
  const T* row;
  Float temperature;
  Float operator()(int64_t d, int n) const { return div(load_logits(row + d, n), temperature); }
};

template <class T>
void forward(const DistillationParams& p, int64_t begin, int64_t end) {
  const Float temperature = broadcast(p.temperature);
  for (int64_t r = begin; r < end; r++) {
    const T* row = static_cast<const T*>(p.student) + r * p.student_stride;
    const T* taught = static_cast<const T*>(p.teacher) + r * p.teacher_stride;
    const Tempered<T> student{row, temperature}, teacher{taught, temperature};
    const Part s = whole_row<false>(p.vocabulary, student), t = whole_row<false>(p.vocabulary, teacher);
    const Part plain = whole_row<false>(p.vocabulary, [&](int64_t d, int n) { return load_logits(row + d, n); });
    const double of_student = log_sum(s.maximum, s.sum), of_teacher = log_sum(t.maximum, t.sum);
    const double of_plain = log_sum(plain.maximum, plain.sum);
    double* stats = p.stats + 3 * r;
    stats[0] = together(s.maximum, of_student), stats[1] = together(plain.maximum, of_plain);
    stats[2] = together(t.maximum, of_teacher);
    // Of shifted logits, whose differences are exact or nearly so; the logarithms come last, in double.
    const Float ms = broadcast(s.maximum), mt = broadcast(t.maximum);
    double weighted = 0.0;
    for (int64_t at = 0; at < p.vocabulary; at += kPart)
      weighted += sum_over(at + kPart < p.vocabulary ? kPart : p.vocabulary - at, [&](int64_t d, int n) {
        const Float y = sub(teacher(at + d, n), mt), e = exponential(y);
        // 0 times an infinite difference would be NaN.
        return where_equal(e, zero(), zero(), mul(e, sub(y, sub(student(at + d, n), ms))));
      });
    p.soft[r] = static_cast<float>(weighted / t.sum - of_teacher + of_student);
    const int64_t target = p.targets[r];
    const double x = target >= 0 && target < p.vocabulary ? load_one(row + target) : __builtin_nan("");
    p.hard[r] = target == p.ignore_index ? 0.0f : static_cast<float>(of_plain - (x - plain.maximum));
  }
}

template <class T>
void backward(const DistillationBackwardParams& p, int64_t begin, int64_t end) {
  const Float temperature = broadcast(p.temperature);
  for (int64_t r = begin; r < end; r++) {
    const T* row = static_cast<const T*>(p.student) + r * p.student_stride;
    const Tempered<T> student{row, temperature};
    const Tempered<T> teacher{static_cast<const T*>(p.teacher) + r * p.teacher_stride, temperature};
    const Lse at_temperature = split(p.stats[3 * r]), plain = split(p.stats[3 * r + 1]);
    const Lse taught = split(p.stats[3 * r + 2]);
    const Float s_high = broadcast(at_temperature.high), s_low = broadcast(at_temperature.low);
    const Float t_high = broadcast(taught.high), t_low = broadcast(taught.low);
    const Float high = broadcast(plain.high), low = broadcast(plain.low);
    const Float scale = broadcast(p.grad_soft[r] / p.temperature), soft = broadcast(p.soft[r]);
    if (p.teacher_out) {
      T* out = static_cast<T*>(p.teacher_out) + r * p.vocabulary;
      for_each_vector(p.vocabulary, [&](int64_t d, int n) {
        const Float log_q = sub(sub(teacher(d, n), t_high), t_low), q = exponential(log_q);
        const Float log_p = sub(sub(student(d, n), s_high), s_low);
        const Float y = mul(mul(scale, q), sub(sub(log_q, log_p), soft));
        store_some(out + d, where_equal(q, zero(), mul(scale, q), y), n);
      });
    }
    if (!p.student_out) continue;
    T* out = static_cast<T*>(p.student_out) + r * p.vocabulary;
    const int64_t target = p.targets[r];
    const LossRule rule = {p.ignore_index, 0.0f, 0.0f};
    const Slope s = slope_of(rule, p.grad_hard[r], p.stats[3 * r + 1], target, p.vocabulary);
    const Float grad = broadcast(s.grad);
    auto softly = [&](int64_t d, int n) {
      const Float q = probability(teacher(d, n), t_high, t_low);
      return mul(scale, sub(probability(student(d, n), s_high, s_low), q));
    };
    for_each_vector(p.vocabulary, [&](int64_t d, int n) {
      const Float hard = slope(probability(load_logits(row + d, n), high, low), zero(), zero(), grad);
      store_some(out + d, add(softly(d, n), hard), n);
    });
    if (target < 0 || target >= p.vocabulary) continue;
    alignas(64) float part[kWidth];
    store(part, softly(target, 1));
    store_one(out + target, part[0] + slope_at_target(load_one(row + target), plain, s));
  }
}

}  // namespace

void distillation(const DistillationParams& p) {
  over_rows(p, [&](int64_t begin, int64_t end) {
    with_type(p.dtype, [&](auto element) { forward<decltype(element)>(p, begin, end); });
  });
}

void distillation_backward(const DistillationBackwardParams& p) {
  over_rows(p, [&](int64_t begin, int64_t end) {
    with_type(p.dtype, [&](auto element) { backward<decltype(element)>(p, begin, end); });
  });
}

}  // namespace llmkern::LLMKERN_ISA
