// The cross-entropy of a linear head for the CPU, with its gradients; compiled once per instruction set.
//
// The logits of a chunk of rows stay until its log-sum-exps are known. One pass over the weight then does two things
// with each block of it: the gradients of the chunk before, and the logits of the next, which take the place of those
// just used. docs/loss.md counts the bytes.
#include "../common/parallel.h"
#include "head.h"
#include "row.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int kSums = 4;  // chains in which the blocks' sums are added

template <class T>
struct Linear {
  const LinearCrossEntropyParams& p;
  Head<T> head{p.head, p.vocabulary, p.chunk};
  bool hidden = p.upstream && p.grads.hidden, weight = p.upstream && p.grads.weight,
       any = p.upstream && (hidden || weight || p.grads.bias);
  int64_t blocks = block_count(p.vocabulary), each = blocks_of_group(p.vocabulary), groups = group_count(p.vocabulary);
  Chunk chunks[2] = {};
  float *partial = nullptr, *logits = nullptr, *statistics = nullptr;
  float *at_target, *lse, *scale, *shift, *hit;  // of the chunk's rows

  explicit Linear(const LinearCrossEntropyParams& params) : p(params) {
    Memory memory{p.work};
    for (Chunk& c : chunks) c = head.place(memory, weight);
    if (hidden) partial = memory.take(groups * p.chunk * head.step);
    if (!p.backward) statistics = memory.take(blocks * kBlockStatistics * p.chunk);
    if (!p.backward && any) logits = memory.take(blocks * kVocabularyBlock * p.chunk);
    at_target = memory.take(p.chunk), lse = memory.take(p.chunk);
    scale = memory.take(p.chunk), shift = memory.take(p.chunk), hit = memory.take(p.chunk);
  }

  // What the lanes of a block's logits are: the rows' maximum, sum of e^(x - maximum) and sum.
  void look(const Chunk& c, int64_t block, int64_t first, int64_t count, const float* x) {
    float* to = statistics + block * kBlockStatistics * p.chunk;
    for (int64_t r = 0; r < c.rows; r += kWidth) {
      Float m = broadcast(-kInfinity), sum = zero(), total = zero();
      for (int64_t v = 0; v < count; v++) m = max(load(x + v * p.chunk + r), m);  // m where x is NaN
      const Float shift = shift_of(m);
      for (int64_t v = 0; v < count; v++) sum = add(sum, exp_negative(sub(load(x + v * p.chunk + r), shift)));
      if (p.rule.smoothing != 0.0f)
        for (int64_t v = 0; v < count; v++) total = add(total, load(x + v * p.chunk + r));
      store(to + r, m), store(to + p.chunk + r, sum), store(to + 2 * p.chunk + r, total);
    }
    for (int64_t r = 0; r < c.rows; r++) {
      // Beside an infinity the sum is NaN either way.
      if (to[r] == kInfinity) {
        to[p.chunk + r] = 1.0f;
        for (int64_t v = 0; v < count; v++) {
          float one = x[v * p.chunk + r];
          if (one != one) to[p.chunk + r] = one;
        }
      }
      const int64_t t = p.targets[c.first + r] - first;
      if (t >= 0 && t < count) at_target[r] = x[t * p.chunk + r];
    }
  }

  // From the blocks' statistics: log-sum-exps and losses.
  void finish_rows(const Chunk& c) {
    for (int64_t r = 0; r < c.rows; r += kWidth) {
      Float m = broadcast(-kInfinity), sums[kSums] = {zero(), zero(), zero(), zero()};
      Float totals[kSums] = {zero(), zero(), zero(), zero()};
      const float* from = statistics + r;
      for (int64_t b = 0; b < blocks; b++) m = max(load(from + b * kBlockStatistics * p.chunk), m);
      for (int64_t b = 0; b < blocks; b++, from += kBlockStatistics * p.chunk) {
        sums[b % kSums] = fma(load(from + p.chunk), factor_of(load(from), m), sums[b % kSums]);
        totals[b % kSums] = add(totals[b % kSums], load(from + 2 * p.chunk));
      }
      alignas(64) float largest[kWidth], sum[kWidth], total[kWidth];
      store(largest, m);
      store(sum, add(add(sums[0], sums[1]), add(sums[2], sums[3])));
      store(total, add(add(totals[0], totals[1]), add(totals[2], totals[3])));
      for (int64_t i = 0; i < kWidth && r + i < c.rows; i++) {
        const int64_t row = c.first + r + i, t = p.targets[row];
        const float found = log_sum(largest[i], sum[i], sum[i] != sum[i]);
        const float x = t >= 0 && t < p.vocabulary ? at_target[r + i] : __builtin_nanf("");
        p.lse[row] = found;
        p.loss[row] = loss_of(p.rule, found, x, total[i], t, p.vocabulary);
      }
    }
  }

  void find_slopes(const Chunk& c) {
    for (int64_t r = 0; r < p.chunk; r++) {
      Slope s = {};
      lse[r] = 0.0f;
      if (r < c.rows) {
        lse[r] = p.lse[c.first + r];
        s = slope_of(p.rule, p.upstream[c.first + r], lse[r], p.targets[c.first + r], p.vocabulary);
      }
      scale[r] = s.scale, shift[r] = s.shift, hit[r] = s.hit;
    }
  }

  // The gradient of a block's logits.
  void differentiate(const Chunk& c, int64_t first, int64_t count, const float* x, float* g) const {
    for (int64_t r = 0; r < c.rows; r += kWidth) {
      const Float l = load(lse + r), factor = load(scale + r), less = load(shift + r), none = zero();
      for (int64_t v = 0; v < count; v++) {
        Float y = mul(exp_negative(sub(load(x + v * p.chunk + r), l)), factor);
        store(g + v * p.chunk + r, sub(where_equal(factor, none, none, y), less));
      }
    }
    for (int64_t r = 0; r < c.rows; r++) {
      const int64_t t = p.targets[c.first + r] - first;
      if (t >= 0 && t < count) g[t * p.chunk + r] -= hit[r];
    }
  }

  // One pass over the weight: the gradients of `before` and the logits of `next`, or, where the log-sum-exps are
  // given, both of `before`.
  void pass(const Chunk* before, const Chunk* next, bool first_chunk) {
    Counter counter;
    auto body = [&](int, int) {
      const int64_t block_units = kVocabularyBlock * p.chunk;
      Memory memory{static_cast<float*>(
          scratch(Scratch::work, static_cast<size_t>(4 * (head.copy_units() + 2 * block_units + 64))))};
      float *copy = memory.take(head.copy_units()), *g = memory.take(block_units), *own = memory.take(block_units);
      for (int64_t group; (group = counter.take()) < groups;) {
        float* part = hidden ? partial + group * p.chunk * head.step : nullptr;
        const int64_t begin = group * each, end = begin + each < blocks ? begin + each : blocks;
        for (int64_t block = begin; block < end; block++) {
          const int64_t first = block * kVocabularyBlock, left = p.vocabulary - first;
          const int64_t count = left < kVocabularyBlock ? left : kVocabularyBlock;
          float* x = logits ? logits + block * block_units : own;
          const Weights w = head.weights(first, count, copy);
          Ahead ahead = head.next_block(first, before && weight ? p.grads.weight : nullptr);
          if (before) {
            if (p.backward) head.logits(w, *before, first, count, x, ahead);
            differentiate(*before, first, count, x, g);
            head.gradients(p.grads, w, *before, first, count, g, part, block == begin, first_chunk, ahead);
          }
          if (next) {
            head.logits(w, *next, first, count, x, ahead);
            look(*next, block, first, count, x);
          }
        }
      }
    };
    parallel(p.threads, body);
  }

  void run() {
    int64_t number = 0;
    Chunk* before = nullptr;
    for (int64_t first = 0; first < p.rows || before; first += p.chunk, number++) {
      Chunk* next = nullptr;
      if (first < p.rows) {
        next = &chunks[number % 2];
        head.pack(*next, first, p.rows - first < p.chunk ? p.rows - first : p.chunk);
      }
      if (p.backward) before = next;
      if (!before && p.backward) break;
      if (before) find_slopes(*before);
      pass(before, p.backward ? nullptr : next, number == (p.backward ? 0 : 1));
      if (before && hidden) {
        auto body = [&](int thread, int threads) {
          const Range range = share(before->rows, 1, thread, threads);
          head.finish_hidden(p.grads.hidden, partial, groups, *before, range.begin, range.end);
        };
        parallel(p.threads, body);
      }
      if (!p.backward && next) finish_rows(*next);
      before = p.backward || !any ? nullptr : next;
    }
  }
};

}  // namespace

void linear_cross_entropy(const LinearCrossEntropyParams& p) {
  with_type(p.dtype, [&](auto element) { Linear<decltype(element)>(p).run(); });
}

}  // namespace llmkern::LLMKERN_ISA
