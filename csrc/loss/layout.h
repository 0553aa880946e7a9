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
LLMKERN_INLINE int64_t blocks_of_group(int64_t vocabulary) {
  return (block_count(vocabulary) + kMostGroups - 1) / kMostGroups;
}
LLMKERN_INLINE int64_t group_count(int64_t vocabulary) {
  int64_t each = blocks_of_group(vocabulary);
  return each ? (block_count(vocabulary) + each - 1) / each : 0;
}

// A chunk of hidden states, packed: by columns, in panels of up to 64 rows, and by rows for the weight's gradient.
LLMKERN_INLINE int64_t column_units(int64_t width, int64_t chunk) { return round_up(chunk, 64) * width; }
LLMKERN_INLINE int64_t head_units(int64_t width, int64_t chunk, bool by_row) {
  return column_units(width, chunk) + (by_row ? chunk * row_units(width) : 0) + 32;
}
LLMKERN_INLINE int64_t partial_units(int64_t width, int64_t vocabulary, int64_t chunk) {
  return group_count(vocabulary) * chunk * row_units(width);
}
LLMKERN_INLINE int64_t linear_cross_entropy_units(int64_t width, int64_t vocabulary, int64_t chunk, bool hidden,
                                                  bool weight, bool any, bool backward) {
  int64_t blocks = block_count(vocabulary), units = 2 * head_units(width, chunk, weight) + 8 * chunk;
  if (hidden) units += partial_units(width, vocabulary, chunk);
  if (!backward) units += blocks * chunk * (kBlockStatistics + (any ? kVocabularyBlock : 0));
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
