// The cross-entropy of a linear head for the CPU, with its gradients; compiled once per instruction set.
//
// The logits of a chunk of rows stay until its log-sum-exps are known. One pass over the weight then does two things
// with each block of it: the gradients of the chunk before, and the logits of the next, which take the place of those
// just used. docs/loss.md counts the bytes.
#include "passes.h"
#include "row.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int kSums = 4;  // chains of additions

template <class T>
struct Linear {
  const LinearCrossEntropyParams& p;
  Head<T> head{p.head, p.vocabulary, p.chunk};
  bool hidden = p.upstream && p.grads.hidden, weight = p.upstream && p.grads.weight,
       any = p.upstream && (hidden || weight || p.grads.bias);
  int64_t blocks = block_count(p.vocabulary);
  Chunk chunks[2] = {};
  float *partial = nullptr, *logits = nullptr, *statistics = nullptr;
  float *at_target, *high, *low, *grad, *even, *of_z;  // of the chunk's rows

  explicit Linear(const LinearCrossEntropyParams& params) : p(params) {
    Memory memory{p.work};
    for (Chunk& c : chunks) c = head.place(memory, weight);
    if (hidden) partial = memory.take(partial_units(p.head.width, p.vocabulary, p.chunk));
    if (!p.backward) statistics = memory.take(blocks * kBlockStatistics * p.chunk);
    if (!p.backward && any) logits = memory.take(blocks * kVocabularyBlock * p.chunk);
    at_target = memory.take(p.chunk), high = memory.take(p.chunk), low = memory.take(p.chunk);
    grad = memory.take(p.chunk), even = memory.take(p.chunk), of_z = memory.take(p.chunk);
  }

  // What the lanes of a block's logits are: the rows' maximum, sum of e^(x - maximum) and sum of x - maximum.
  void look(const Chunk& c, int64_t block, int64_t first, int64_t count, const float* x) {
    float* to = statistics + block * kBlockStatistics * p.chunk;
    for (int64_t r = 0; r < c.rows; r += kWidth) {
      const float* lane = x + r;
      Float m[kSums], sums[kSums], totals[kSums];
      for (int i = 0; i < kSums; i++) m[i] = broadcast(-kInfinity), sums[i] = totals[i] = zero();
      auto each = [&](auto f) {
        int64_t v = 0;
        for (; v + kSums <= count; v += kSums)
#pragma GCC unroll 4
          for (int i = 0; i < kSums; i++) f(i, load(lane + (v + i) * p.chunk));
        for (; v < count; v++) f(0, load(lane + v * p.chunk));
      };
      each([&](int i, Float y) { m[i] = max(y, m[i]); });  // the second where the first is NaN
      const Float largest = max(max(m[0], m[1]), max(m[2], m[3])), shift = shift_of(largest);
      if (p.rule.smoothing != 0.0f)
        each([&](int i, Float y) {
          y = sub(y, shift);
          sums[i] = add(sums[i], exp_negative(y)), totals[i] = add(totals[i], y);
        });
      else
        each([&](int i, Float y) { sums[i] = add(sums[i], exp_negative(sub(y, shift))); });
      store(to + r, largest);
      store(to + p.chunk + r, add(add(sums[0], sums[1]), add(sums[2], sums[3])));
      store(to + 2 * p.chunk + r, add(add(totals[0], totals[1]), add(totals[2], totals[3])));
    }
    for (int64_t r = 0; r < c.rows; r++) {
      const int64_t t = p.targets[c.first + r] - first;
      if (t >= 0 && t < count) at_target[r] = x[t * p.chunk + r];
    }
  }

  // From the blocks' statistics: log-sum-exps and losses.
  void finish_rows(const Chunk& c) {
    for (int64_t r = 0; r < c.rows; r += kWidth) {
      Float m = broadcast(-kInfinity), sums[kSums], totals[kSums];
      for (int i = 0; i < kSums; i++) sums[i] = totals[i] = zero();
      const float* from = statistics + r;
      for (int64_t b = 0; b < blocks; b++) m = max(load(from + b * kBlockStatistics * p.chunk), m);
      for (int64_t b = 0; b < blocks; b++, from += kBlockStatistics * p.chunk) {
        const int64_t left = p.vocabulary - b * kVocabularyBlock;
        const Float of_block = load(from), count = broadcast(static_cast<float>(at_most(kVocabularyBlock, left)));
        Float &s = sums[b % kSums], &t = totals[b % kSums];
        s = fma(load(from + p.chunk), factor_of(of_block, m), s);
        t = add(t, fma(count, sub(shift_of(of_block), m), load(from + 2 * p.chunk)));
      }
      alignas(64) float largest[kWidth], sum[kWidth], total[kWidth];
      store(largest, m);
      store(sum, add(add(sums[0], sums[1]), add(sums[2], sums[3])));
      store(total, add(add(totals[0], totals[1]), add(totals[2], totals[3])));
      for (int64_t i = 0; i < kWidth && r + i < c.rows; i++) {
        const int64_t row = c.first + r + i, t = p.targets[row];
        p.loss[row] = 0.0f, p.lse[row] = 0.0;
        if (t == p.rule.ignore_index) continue;
        const double maximum = largest[i], logarithm = log_sum(maximum, sum[i]);
        const double x = t >= 0 && t < p.vocabulary ? at_target[r + i] : __builtin_nan("");
        p.loss[row] = loss_of(p.rule, maximum, logarithm, x, total[i] / static_cast<double>(p.vocabulary));
        p.lse[row] = maximum + logarithm;
      }
    }
  }

  Slope slope_of_row(const Chunk& c, int64_t r) const {
    const int64_t row = c.first + r;
    return slope_of(p.rule, p.upstream[row], p.lse[row], p.targets[row], p.vocabulary);
  }
  void find_slopes(const Chunk& c) {
    for (int64_t r = 0; r < p.chunk; r++) {
      Slope s = {};
      Lse lse = {};
      if (r < c.rows) s = slope_of_row(c, r), lse = split(p.lse[c.first + r]);
      grad[r] = s.grad, even[r] = s.even, of_z[r] = s.of_z, high[r] = lse.high, low[r] = lse.low;
    }
  }

  // The gradient of a block's logits.
  void differentiate(const Chunk& c, int64_t first, int64_t count, const float* x, float* g) const {
    for (int64_t r = 0; r < c.rows; r += kWidth) {
      const Float h = load(high + r), l = load(low + r), e = load(even + r), z = load(of_z + r),
                  factor = load(grad + r);
      for (int64_t v = 0; v < count; v++)
        store(g + v * p.chunk + r, slope(probability(load(x + v * p.chunk + r), h, l), e, z, factor));
    }
    for (int64_t r = 0; r < c.rows; r++) {
      const int64_t t = p.targets[c.first + r] - first, at = t * p.chunk + r;
      if (t >= 0 && t < count) g[at] = slope_at_target(x[at], {high[r], low[r]}, slope_of_row(c, r));
    }
  }

  void pack(int slot, int64_t first, int64_t rows) { head.pack(chunks[slot], first, rows); }

  void pass(int old, int next, int64_t number) {
    if (p.backward) old = next;
    const bool first_chunk = number == (p.backward ? 0 : 1);
    const Chunk* before = old < 0 ? nullptr : &chunks[old];
    if (before) find_slopes(*before);
    const int64_t block_units = kVocabularyBlock * p.chunk;
    over_blocks(p.vocabulary, p.threads, head.copy_units() + 2 * block_units, [&](const Block& b, Memory memory) {
      float *copy = memory.take(head.copy_units()), *g = memory.take(block_units), *own = memory.take(block_units);
      float* x = logits ? logits + b.number * block_units : own;
      const Weights w = head.weights(b.first, b.count, copy);
      Ahead ahead = head.next_block(b.first, before && weight ? p.grads.weight : nullptr);
      if (p.backward) head.logits(w, *before, b.first, b.count, x, ahead);
      if (before) {
        float* part = hidden ? partial + b.group * p.chunk * head.step : nullptr;
        differentiate(*before, b.first, b.count, x, g);
        head.gradients(p.grads, w, *before, b.first, b.count, g, part, b.begins, first_chunk, ahead);
      }
      if (!p.backward && next >= 0) {
        head.logits(w, chunks[next], b.first, b.count, x, ahead);
        look(chunks[next], b.number, b.first, b.count, x);
      }
    });
    if (before && hidden) head.finish_hidden(p.grads, partial, group_count(p.vocabulary), *before, p.threads);
    if (!p.backward && next >= 0) finish_rows(chunks[next]);
  }
};

}  // namespace

void linear_cross_entropy(const LinearCrossEntropyParams& p) {
  with_type(p.dtype, [&](auto element) {
    Linear<decltype(element)> job(p);
    over_chunks(job, p.rows, p.chunk, p.backward || !job.any);
  });
}

}  // namespace llmkern::LLMKERN_ISA
