// The losses of distillation from the hidden states of two heads for the CPU, with the student's gradients; compiled
// once per instruction set. As cpu_linear.cpp, with the logits of both heads.
#include "passes.h"
#include "row.h"

namespace llmkern::LLMKERN_ISA {
namespace {

template <class T>
struct Distillation {
  const LinearDistillationParams& p;
  Head<T> student{p.student, p.vocabulary, p.chunk}, teacher{p.teacher, p.vocabulary, p.chunk};
  bool hidden = p.grads.hidden, weight = p.grads.weight, any = hidden || weight || p.grads.bias;
  int64_t blocks = block_count(p.vocabulary);
  LossRule rule{p.ignore_index, 0.0f, 0.0f};
  Chunk chunks[2] = {}, taught[2] = {};
  float *partial = nullptr, *logits = nullptr, *statistics = nullptr;
  float* at_target;  // of the chunk's rows, as those below
  struct Rows {
    float *high, *low;
  } tempered, plain, of_teacher;  // log-sum-exps of student / T, student, teacher / T
  float* grad;                    // of the cross-entropy

  explicit Distillation(const LinearDistillationParams& params) : p(params) {
    Memory memory{p.work};
    for (int i = 0; i < 2; i++) chunks[i] = student.place(memory, weight), taught[i] = teacher.place(memory, false);
    if (hidden) partial = memory.take(partial_units(p.student.width, p.vocabulary, p.chunk));
    statistics = memory.take(blocks * kDistillationStatistics * p.chunk);
    if (any) logits = memory.take(2 * blocks * kVocabularyBlock * p.chunk);
    at_target = memory.take(p.chunk), grad = memory.take(p.chunk);
    auto rows = [&] { return Rows{memory.take(p.chunk), memory.take(p.chunk)}; };
    tempered = rows(), plain = rows(), of_teacher = rows();
  }

  void pack(int slot, int64_t first, int64_t rows) {
    student.pack(chunks[slot], first, rows), teacher.pack(taught[slot], first, rows);
  }

  // The lanes' maxima of student and teacher; sums of e^(x - maximum) of student / T, student and teacher / T; and the
  // sum of the last times the difference of the shifted logits.
  void look(const Chunk& c, const Block& b, const float* x, const float* y) {
    float* to = statistics + b.number * kDistillationStatistics * p.chunk;
    const Float temperature = broadcast(p.temperature);
    for (int64_t r = 0; r < c.rows; r += kWidth) {
      Float ms = broadcast(-kInfinity), mt = ms, sums[4] = {zero(), zero(), zero(), zero()};
      for (int64_t v = 0; v < b.count; v++) {
        ms = max(load(x + v * p.chunk + r), ms), mt = max(load(y + v * p.chunk + r), mt);
      }
      const Float s_shift = shift_of(ms), t_shift = shift_of(mt);
      const Float s_tempered = div(s_shift, temperature), t_tempered = div(t_shift, temperature);
      for (int64_t v = 0; v < b.count; v++) {
        const Float s = load(x + v * p.chunk + r), t = load(y + v * p.chunk + r);
        const Float from_s = sub(div(s, temperature), s_tempered), from_t = sub(div(t, temperature), t_tempered);
        const Float e = exponential(from_t);
        sums[0] = add(sums[0], exponential(from_s)), sums[1] = add(sums[1], exponential(sub(s, s_shift)));
        sums[2] = add(sums[2], e);
        // 0 times an infinite difference would be NaN.
        sums[3] = add(sums[3], where_equal(e, zero(), zero(), mul(e, sub(from_t, from_s))));
      }
      store(to + r, ms), store(to + p.chunk + r, mt);
      for (int i = 0; i < 4; i++) store(to + (2 + i) * p.chunk + r, sums[i]);
    }
    for (int64_t r = 0; r < c.rows; r++) {
      const int64_t t = p.targets[c.first + r] - b.first;
      if (t >= 0 && t < b.count) at_target[r] = x[t * p.chunk + r];
    }
  }

  void finish_rows(const Chunk& c) {
    const Float temperature = broadcast(p.temperature);
    const int64_t step = kDistillationStatistics * p.chunk;
    for (int64_t r = 0; r < p.chunk; r++)
      if (r >= c.rows) keep(r, {}, {}, {}, 0.0f);
    for (int64_t r = 0; r < c.rows; r += kWidth) {
      Float ms = broadcast(-kInfinity), mt = ms, sums[4][2] = {};
      for (int64_t b = 0; b < blocks; b++) {
        const float* from = statistics + b * step + r;
        ms = max(load(from), ms), mt = max(load(from + p.chunk), mt);
      }
      const Float s_tempered = div(ms, temperature), t_tempered = div(mt, temperature);
      for (int64_t b = 0; b < blocks; b++) {
        const float* from = statistics + b * step + r;
        auto at = [&](int i) { return load(from + i * p.chunk); };
        const Float s = at(0), t = at(1), of_s = div(shift_of(s), temperature), of_t = div(shift_of(t), temperature);
        auto add_to = [&](int i, Float x) { sums[i][b % 2] = add(sums[i][b % 2], x); };
        add_to(0, mul(at(2), factor_of(div(s, temperature), s_tempered)));
        add_to(1, mul(at(3), factor_of(s, ms)));
        const Float factor = factor_of(div(t, temperature), t_tempered), sum = mul(at(4), factor);
        add_to(2, sum);
        const Float moved = sub(sub(of_t, t_tempered), sub(of_s, s_tempered));
        add_to(3, where_equal(sum, zero(), zero(), fma(sum, moved, mul(at(5), factor))));
      }
      alignas(64) float found[6][kWidth];
      store(found[0], ms), store(found[1], mt);
      for (int i = 0; i < 4; i++) store(found[2 + i], add(sums[i][0], sums[i][1]));
      for (int64_t i = 0; i < kWidth && r + i < c.rows; i++) {
        const int64_t row = c.first + r + i, target = p.targets[row];
        const double m = found[0][i], m_tempered = found[0][i] / p.temperature,
                     mt_tempered = found[1][i] / p.temperature;
        const double s = log_sum(m, found[2][i]), hard = log_sum(m, found[3][i]);
        const double t = log_sum(found[1][i], found[4][i]);
        p.soft[row] = static_cast<float>(static_cast<double>(found[5][i]) / found[4][i] - t + s);
        const double x = target >= 0 && target < p.vocabulary ? at_target[r + i] : __builtin_nan("");
        p.hard[row] = target == p.ignore_index ? 0.0f : static_cast<float>(hard - (x - m));
        const float factor = slope_of(rule, p.hard_factor, 0.0, target, p.vocabulary).grad;
        const Lse of_student = split(together(m_tempered, s)), of_plain = split(together(m, hard));
        keep(r + i, of_student, of_plain, split(together(mt_tempered, t)), factor);
      }
    }
  }
  void keep(int64_t r, Lse s, Lse hard, Lse t, float factor) {
    tempered.high[r] = s.high, tempered.low[r] = s.low, plain.high[r] = hard.high, plain.low[r] = hard.low;
    of_teacher.high[r] = t.high, of_teacher.low[r] = t.low, grad[r] = factor;
  }

  // The gradient of a block's logits of the student.
  void differentiate(const Chunk& c, const Block& b, const float* x, const float* y, float* g) const {
    const Float temperature = broadcast(p.temperature), scale = broadcast(p.soft_factor / p.temperature);
    for (int64_t r = 0; r < c.rows; r += kWidth) {
      auto of = [&](const Rows& rows, Float z) { return probability(z, load(rows.high + r), load(rows.low + r)); };
      const Float factor = load(grad + r);
      const Float inside = first(static_cast<int>(at_most(kWidth, c.rows - r)), scale, zero());
      for (int64_t v = 0; v < b.count; v++) {
        const Float s = load(x + v * p.chunk + r), t = load(y + v * p.chunk + r);
        const Float soft = sub(of(tempered, div(s, temperature)), of(of_teacher, div(t, temperature)));
        const Float hard = slope(of(plain, s), zero(), zero(), factor);
        store(g + v * student.g_step + r, fma(soft, inside, hard));
      }
    }
    for (int64_t r = 0; r < c.rows; r++) {
      const int64_t target = p.targets[c.first + r], t = target - b.first, at = t * p.chunk + r;
      if (t < 0 || t >= b.count) continue;
      const Slope s = slope_of(rule, p.hard_factor, 0.0, target, p.vocabulary);
      alignas(64) float soft[kWidth];
      auto of = [&](const Rows& rows, float z) {
        return probability(div(broadcast(z), temperature), broadcast(rows.high[r]), broadcast(rows.low[r]));
      };
      store(soft, mul(sub(of(tempered, x[at]), of(of_teacher, y[at])), scale));
      g[t * student.g_step + r] = soft[0] + slope_at_target(x[at], {plain.high[r], plain.low[r]}, s);
    }
  }

  void pass(int before, int next, int64_t number) {
    const int64_t units = kVocabularyBlock * p.chunk, g_units = kVocabularyBlock * student.g_step;
    const int64_t all = student.copy_units() + teacher.copy_units() + g_units + 2 * units;
    over_blocks({0, blocks}, {}, p.vocabulary, p.threads, all, [&](const Block& b, Memory memory) {
      float *copy = memory.take(student.copy_units()), *other_copy = memory.take(teacher.copy_units());
      float *g = memory.take(g_units), *x = memory.take(2 * units), *y = x + units;
      if (logits) x = logits + 2 * b.number * units, y = x + units;
      const Weights w = student.weights(b.first, b.count, copy);
      Visit visit = {b.first, b.count};
      if (before >= 0) {
        differentiate(chunks[before], b, x, y, g);
        visit.before = &chunks[before], visit.g = g, visit.fresh = b.begins, visit.first_chunk = number == 1;
        if (hidden) visit.partial = partial + b.group * p.chunk * student.step;
      }
      if (next >= 0) visit.next = &chunks[next], visit.x = x;
      student.visit(visit, w, p.grads);
      if (next < 0) return;
      Visit of_teacher = {b.first, b.count};
      of_teacher.next = &taught[next], of_teacher.x = y;
      teacher.visit(of_teacher, teacher.weights(b.first, b.count, other_copy), {});
      look(chunks[next], b, x, y);
    });
    if (before >= 0 && hidden)
      student.finish_hidden(p.grads, partial, group_count({0, blocks}), chunks[before], false, p.threads);
    if (next >= 0) finish_rows(chunks[next]);
  }
};

}  // namespace

void linear_distillation(const LinearDistillationParams& p) {
  with_type(p.dtype, [&](auto element) {
    Distillation<decltype(element)> job(p);
    over_chunks(job, p.rows, p.chunk, !job.any);
  });
}

}  // namespace llmkern::LLMKERN_ISA
