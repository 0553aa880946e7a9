// How the vocabulary and the scratch memory of the linear losses are cut, on every processor alike: results must not
// depend on the number of threads, and Python allocates the memory.
#pragma once
#include "../common/arithmetic.h"
#include "params.h"

namespace llmkern {

// A block of the vocabulary: its rows of the weight, of a gradient, of packed hidden states stay in the second-level
// cache together. A multiple of the rows of a tile.
constexpr int64_t kVocabularyBlock = 96;
// Consecutive blocks whose parts of the hidden states' gradient are summed together: the pieces that threads take.
constexpr int64_t kMostGroups = 12;
// Numbers of a block that each row keeps for its statistics.
constexpr int64_t kBlockStatistics = 3, kDistillationStatistics = 6;

// An odd number of cache lines: rows that far apart spread over all sets of a cache.
LLMKERN_INLINE int64_t row_units(int64_t width) {
  int64_t lines = round_up(width, 16) / 16;
  return 16 * (lines + 1 - lines % 2);
}
LLMKERN_INLINE int64_t block_count(int64_t vocabulary) {
  return (vocabulary + kVocabularyBlock - 1) / kVocabularyBlock;
}

// Blocks [begin, end), and how they are cut into groups.
struct Region {
  int64_t begin, end;
};
LLMKERN_INLINE int64_t blocks_of_group(const Region& r) { return (r.end - r.begin + kMostGroups - 1) / kMostGroups; }
LLMKERN_INLINE int64_t group_count(const Region& r) {
  const int64_t each = blocks_of_group(r);
  return each ? (r.end - r.begin + each - 1) / each : 0;
}

// A chunk of hidden states, packed: by columns, in panels of up to 64 rows, and by rows for the weight's gradient.
LLMKERN_INLINE int64_t column_units(int64_t width, int64_t chunk) { return round_up(chunk, 64) * width; }
LLMKERN_INLINE int64_t head_units(int64_t width, int64_t chunk, bool by_row) {
  return column_units(width, chunk) + (by_row ? chunk * row_units(width) : 0) + 32;
}
LLMKERN_INLINE int64_t partial_units(int64_t width, int64_t vocabulary, int64_t chunk) {
  return at_most(block_count(vocabulary), kMostGroups) * chunk * row_units(width);
}

// How the vocabulary of a cross-entropy is divided, and where a chunk's logits lie until its log-sum-exps are known.
//
// Twice the rows in a chunk halve the ways of the weight and of its gradient for each row, and twice the logits would
// have to be held. But of the gradient's own memory the last part can wait: it is lent to the logits of the `front`
// blocks before it, which together with `own` blocks of the work memory hold them all. The last part's own logits are
// dropped, and made again with all rows' log-sum-exps when the front is done: a product more, of this part alone.
struct Division {
  int64_t blocks, own, front;
};
constexpr int64_t kRows = 64, kManyRows = 128;  // of a chunk, and of one that memory is lent to or that holds nothing
// As many rows' logits in the work memory as leave a ninth of the vocabulary to make again (a twenty-seventh of all
// products), never more than those of a usual chunk. By width and vocabulary alone, since the groups are.
LLMKERN_INLINE Division divide(int64_t width, int64_t vocabulary) {
  const int64_t blocks = block_count(vocabulary), block = kVocabularyBlock * kManyRows;
  const int64_t rows = at_least(0, at_most((8 * kManyRows - width) / 9, kRows));
  const int64_t own = (rows * blocks + kManyRows - 1) / kManyRows;
  if (own >= blocks) return {blocks, blocks, blocks};
  return {blocks, own, (vocabulary * width + own * block) / (block + kVocabularyBlock * width)};
}
LLMKERN_INLINE Division undivided(int64_t vocabulary) {
  const int64_t blocks = block_count(vocabulary);
  return {blocks, blocks, blocks};
}

// What a cross-entropy makes, and how.
struct LinearPlan {
  bool hidden, weight, any, backward;  // gradients that are made; any: of these or of the bias
  bool divided, lends;                 // sums go over the parts of a Division; memory is lent too
  int64_t chunk;                       // rows
};
LLMKERN_INLINE LinearPlan linear_plan(bool hidden, bool weight, bool bias, bool backward, DType dtype) {
  const bool any = hidden || weight || bias;
  const bool divided = dtype == DType::f32;  // of 16 bits the hidden states' gradient is rounded: its sum has one part
  const int64_t chunk = (divided && weight) || !any ? kManyRows : kRows;
  return {hidden, weight, any, backward, divided, divided && weight && !backward, chunk};
}
LLMKERN_INLINE LinearPlan plan_of(const LinearCrossEntropyParams& p) {
  const bool any = p.upstream;
  return linear_plan(any && p.grads.hidden, any && p.grads.weight, any && p.grads.bias, p.backward, p.dtype);
}
LLMKERN_INLINE int64_t linear_cross_entropy_units(int64_t width, int64_t vocabulary, const LinearPlan& plan) {
  const int64_t blocks = block_count(vocabulary), chunk = plan.chunk;
  int64_t units = (plan.backward ? 1 : 2) * head_units(width, chunk, plan.weight) + 8 * chunk;
  if (plan.hidden) units += partial_units(width, vocabulary, chunk);
  if (!plan.backward) units += blocks * chunk * kBlockStatistics;
  if (!plan.backward && plan.any)
    units += (plan.lends ? divide(width, vocabulary).own : blocks) * chunk * kVocabularyBlock;
  return units + 256;
}
LLMKERN_INLINE int64_t linear_distillation_units(int64_t width, int64_t teacher_width, int64_t vocabulary,
                                                 int64_t chunk, bool hidden, bool weight, bool any) {
  int64_t units = 2 * (head_units(width, chunk, weight) + head_units(teacher_width, chunk, false)) + 16 * chunk;
  if (hidden) units += partial_units(width, vocabulary, chunk);
  units += block_count(vocabulary) * chunk * (kDistillationStatistics + (any ? 2 * kVocabularyBlock : 0));
  return units + 512;
}

}  // namespace llmkern
