// The cross-entropy of a linear head for the CPU, with its gradients; compiled once per instruction set.
//
// The logits of a chunk of rows stay until its log-sum-exps are known. One pass over the weight then does two things
// with each block of it: the gradients of the chunk before, and the logits of the next, which take the place of those
// just used. Part of the logits lies in memory of the weight's gradient, whose turn comes after all chunks (Division in
// layout.h). docs/loss.md counts the bytes.
#include "passes.h"
#include "row.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int kSums = 4;  // chains of additions

template <class T>
struct Linear {
  const LinearCrossEntropyParams& p;
  LinearPlan plan = plan_of(p);
  Division division = plan.divided ? divide(p.head.width, p.vocabulary) : undivided(p.vocabulary);
  int64_t chunk_rows = plan.chunk, block_units = kVocabularyBlock * chunk_rows;
  Head<T> head{p.head, p.vocabulary, chunk_rows};
  Chunk chunks[2] = {};
  float *partial = nullptr, *logits = nullptr, *statistics = nullptr;
  float *at_target, *high, *low, *grad, *even, *of_z;  // of the chunk's rows

  explicit Linear(const LinearCrossEntropyParams& params) : p(params) {
    Memory memory{p.work};
    for (int i = 0; i < (p.backward ? 1 : 2); i++) chunks[i] = head.place(memory, plan.weight);
    if (plan.hidden) partial = memory.take(partial_units(p.head.width, p.vocabulary, chunk_rows));
    if (!p.backward) statistics = memory.take(division.blocks * kBlockStatistics * chunk_rows);
    if (!p.backward && plan.any) logits = memory.take(own_blocks() * block_units);
    at_target = memory.take(chunk_rows), high = memory.take(chunk_rows), low = memory.take(chunk_rows);
    grad = memory.take(chunk_rows), even = memory.take(chunk_rows), of_z = memory.take(chunk_rows);
  }

  Region front() const { return {0, division.front}; }
  Region last() const { return {division.front, division.blocks}; }
  int64_t own_blocks() const { return plan.lends ? division.own : division.blocks; }
  // Where a block's logits wait for the log-sum-exps; null where they do not.
  float* held(int64_t block) const {
    if (!logits || block >= (plan.lends ? division.front : division.blocks)) return nullptr;
    if (block < own_blocks()) return logits + block * block_units;
    float* lent = p.grads.weight + division.front * kVocabularyBlock * p.head.width;
    return lent + (block - own_blocks()) * block_units;
  }

  // What the lanes of a block's logits are: the rows' maximum, sum of e^(x - maximum) and sum of x - maximum.
  void look(const Chunk& c, int64_t block, int64_t first, int64_t count, const float* x) {
    float* to = statistics + block * kBlockStatistics * chunk_rows;
    for (int64_t r = 0; r < c.rows; r += kWidth) {
      const float* lane = x + r;
      Float m[kSums], sums[kSums], totals[kSums];
      for (int i = 0; i < kSums; i++) m[i] = broadcast(-kInfinity), sums[i] = totals[i] = zero();
      auto each = [&](auto f) {
        int64_t v = 0;
        for (; v + kSums <= count; v += kSums)
#pragma GCC unroll 4
          for (int i = 0; i < kSums; i++) f(i, load(lane + (v + i) * chunk_rows));
        for (; v < count; v++) f(0, load(lane + v * chunk_rows));
      };
      each([&](int i, Float y) { m[i] = max(y, m[i]); });  // the second where the first is NaN
      const Float largest = max(max(m[0], m[1]), max(m[2], m[3])), shift = shift_of(largest);
      if (p.rule.smoothing != 0.0f)
        each([&](int i, Float y) {
          y = sub(y, shift);
          sums[i] = add(sums[i], exponential(y)), totals[i] = add(totals[i], y);
        });
      else
        each([&](int i, Float y) { sums[i] = add(sums[i], exponential(sub(y, shift))); });
      store(to + r, largest);
      store(to + chunk_rows + r, add(add(sums[0], sums[1]), add(sums[2], sums[3])));
      store(to + 2 * chunk_rows + r, add(add(totals[0], totals[1]), add(totals[2], totals[3])));
    }
    for (int64_t r = 0; r < c.rows; r++) {
      const int64_t t = p.targets[c.first + r] - first;
      if (t >= 0 && t < count) at_target[r] = x[t * chunk_rows + r];
    }
  }

  // From the blocks' statistics: log-sum-exps and losses.
  void finish_rows(const Chunk& c) {
    for (int64_t r = 0; r < c.rows; r += kWidth) {
      Float m = broadcast(-kInfinity), sums[kSums], totals[kSums];
      for (int i = 0; i < kSums; i++) sums[i] = totals[i] = zero();
      const float* from = statistics + r;
      for (int64_t b = 0; b < division.blocks; b++) m = max(load(from + b * kBlockStatistics * chunk_rows), m);
      for (int64_t b = 0; b < division.blocks; b++, from += kBlockStatistics * chunk_rows) {
        const int64_t left = p.vocabulary - b * kVocabularyBlock;
        const Float of_block = load(from), count = broadcast(static_cast<float>(at_most(kVocabularyBlock, left)));
        Float &s = sums[b % kSums], &t = totals[b % kSums];
        s = fma(load(from + chunk_rows), factor_of(of_block, m), s);
        t = add(t, fma(count, sub(shift_of(of_block), m), load(from + 2 * chunk_rows)));
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
        p.lse[row] = together(maximum, logarithm);
      }
    }
  }

  Slope slope_of_row(const Chunk& c, int64_t r) const {
    const int64_t row = c.first + r;
    return slope_of(p.rule, p.upstream[row], p.lse[row], p.targets[row], p.vocabulary);
  }
  void find_slopes(const Chunk& c) {
    for (int64_t r = 0; r < chunk_rows; r++) {
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
        store(g + v * head.g_step + r, slope(probability(load(x + v * chunk_rows + r), h, l), e, z, factor));
    }
    for (int64_t r = 0; r < c.rows; r++) {
      const int64_t t = p.targets[c.first + r] - first;
      if (t >= 0 && t < count)
        g[t * head.g_step + r] = slope_at_target(x[t * chunk_rows + r], {high[r], low[r]}, slope_of_row(c, r));
    }
  }

  void pack(int slot, int64_t first, int64_t rows) { head.pack(chunks[slot], first, rows); }

  // The gradients of one chunk in a region from its logits, which wait or, where `again`, are made again; and the
  // logits of another chunk, in the `other` region too.
  void sweep(const Region& region, const Region& other, const Chunk* before, const Chunk* next, bool first_chunk,
             bool again) {
    const int64_t g_units = kVocabularyBlock * head.g_step, units = head.copy_units() + g_units + block_units;
    over_blocks(region, other, p.vocabulary, p.threads, units, [&](const Block& b, Memory memory) {
      float *copy = memory.take(head.copy_units()), *g = memory.take(g_units), *own = memory.take(block_units);
      float *waiting = again ? nullptr : held(b.number), *x = waiting ? waiting : own;
      const Weights w = head.weights(b.first, b.count, copy);
      Visit visit = {b.first, b.count};
      if (again) {
        visit.next = before, visit.x = x;
        head.visit(visit, w, p.grads);
      }
      if (before && b.number < region.end) {
        differentiate(*before, b.first, b.count, x, g);
        visit.before = before, visit.g = g, visit.fresh = b.begins, visit.first_chunk = first_chunk;
        if (plan.hidden) visit.partial = partial + b.group * chunk_rows * head.step;
      }
      visit.next = next, visit.x = x;
      if (waiting && b.number + 1 < region.end) visit.then = held(b.number + 1);
      head.visit(visit, w, p.grads);
      if (next) look(*next, b.number, b.first, b.count, x);
    });
    if (before && plan.hidden && region.begin < region.end)
      head.finish_hidden(p.grads, partial, group_count(region), *before, region.begin != 0, p.threads);
  }

  void pass(int old, int following, int64_t number) {
    const Chunk *before = old < 0 ? nullptr : &chunks[old], *next = following < 0 ? nullptr : &chunks[following];
    if (before) find_slopes(*before);
    if (plan.lends) {
      sweep(front(), next ? last() : Region{}, before, next, number == 1, false);
    } else {
      sweep(front(), {}, before, next, number == 1, false);
      sweep(last(), {}, before, next, number == 1, false);
    }
    if (next) finish_rows(*next);
  }

  // The gradients of all chunks from logits made again: of the whole vocabulary or of the last part.
  void make_again(bool whole) {
    for (int64_t first = 0; first < p.rows; first += chunk_rows) {
      pack(0, first, at_most(chunk_rows, p.rows - first));
      find_slopes(chunks[0]);
      if (whole) sweep(front(), {}, &chunks[0], nullptr, first == 0, true);
      sweep(last(), {}, &chunks[0], nullptr, first == 0, true);
    }
  }

  void run() {
    if (p.backward) return make_again(true);
    over_chunks(*this, p.rows, chunk_rows, !plan.any);
    if (plan.lends) make_again(false);
  }
};

}  // namespace

void linear_cross_entropy(const LinearCrossEntropyParams& p) {
  with_type(p.dtype, [&](auto element) { Linear<decltype(element)>(p).run(); });
}

}  // namespace llmkern::LLMKERN_ISA
