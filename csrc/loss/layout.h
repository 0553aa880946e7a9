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
  int64_t blocks_of_group() const { return (end - begin + kMostGroups - 1) / kMostGroups; }
  int64_t groups() const { return begin < end ? (end - begin + blocks_of_group() - 1) / blocks_of_group() : 0; }
};

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
// Two chunks of 64 rows at once halve the ways of the weight and of its gradient for each row, and twice the logits
// would have to be held. But of the gradient's own memory the last part can wait: it is `lent` to the logits of the
// blocks in front of it, which together with `own` blocks of the work memory hold them all. Its own logits are dropped,
// and made again with all rows' log-sum-exps when the part in front is done: a product more, of this part alone.
struct Division {
  int64_t blocks, own, front;
  Region held() const { return {0, front}; }
  Region lent() const { return {front, blocks}; }
};
// Rows of a chunk, the usual and where gradient memory is lent.
constexpr int64_t kRows = 64, kLendingRows = 128;
// As many rows in the work memory as let a ninth of the vocabulary do (a ninth more of one product in three), never
// more than a usual chunk has. By width and vocabulary alone, since the groups are.
LLMKERN_INLINE Division divide(int64_t width, int64_t vocabulary) {
  const int64_t blocks = block_count(vocabulary), block = kVocabularyBlock * kLendingRows;
  const int64_t rows = at_least(0, at_most((8 * kLendingRows - width) / 9, kRows));
  const int64_t own = (rows * blocks + kLendingRows - 1) / kLendingRows;
  if (own >= blocks) return {blocks, blocks, blocks};
  return {blocks, own, (vocabulary * width + own * block) / (block + kVocabularyBlock * width)};
}
LLMKERN_INLINE Division undivided(int64_t vocabulary) {
  const int64_t blocks = block_count(vocabulary);
  return {blocks, blocks, blocks};
}

// What a cross-entropy makes, and of what.
struct LinearPlan {
  bool hidden, weight, any, backward;  // gradients that are made; any: of these or of the bias
  bool divided;                        // sums over the vocabulary are, whether or not memory is lent
  bool lends() const { return divided && weight && !backward; }
  int64_t chunk() const { return (divided && weight) || !any ? kLendingRows : kRows; }  // without gradients none waits
};
// Of 16 bits the gradient of the hidden states takes no second sum: it is rounded when it is written.
LLMKERN_INLINE LinearPlan linear_plan(bool hidden, bool weight, bool bias, bool backward, DType dtype) {
  return {hidden, weight, hidden || weight || bias, backward, dtype == DType::f32};
}
LLMKERN_INLINE LinearPlan plan_of(const LinearCrossEntropyParams& p) {
  const bool any = p.upstream;
  return linear_plan(any && p.grads.hidden, any && p.grads.weight, any && p.grads.bias, p.backward, p.dtype);
}
LLMKERN_INLINE int64_t linear_cross_entropy_units(int64_t width, int64_t vocabulary, const LinearPlan& plan) {
  const int64_t blocks = block_count(vocabulary), chunk = plan.chunk();
  int64_t units = (plan.backward ? 1 : 2) * head_units(width, chunk, plan.weight) + 8 * chunk;
  if (plan.hidden) units += partial_units(width, vocabulary, chunk);
  if (!plan.backward) units += blocks * chunk * kBlockStatistics;
  if (!plan.backward && plan.any)
    units += (plan.lends() ? divide(width, vocabulary).own : blocks) * chunk * kVocabularyBlock;
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
