// How the linear losses go over chunks of rows and, for each, over the blocks of the vocabulary.
#pragma once
#include "head.h"

namespace llmkern::LLMKERN_ISA {
namespace {

struct Block {
  int64_t number, first, count;  // of its entries
  int64_t group;
  bool begins;  // the group
};

// Calls body(block, memory) for every block of a region and then of another, those of a group in order on one thread;
// memory: `units` floats of the thread's own. Where the other is small its groups are, and no thread waits long for the
// last one.
template <class Body>
LLMKERN_INLINE void over_blocks(const Region& region, const Region& other, int64_t vocabulary, int threads,
                                int64_t units, Body body) {
  const int64_t groups = group_count(region), all = groups + group_count(other);
  Counter counter;
  auto of_thread = [&](int, int) {
    Memory memory{static_cast<float*>(scratch(Scratch::work, static_cast<size_t>(4 * units + 256)))};
    for (int64_t taken; (taken = counter.take()) < all;) {
      const Region& r = taken < groups ? region : other;
      const int64_t group = taken < groups ? taken : taken - groups, each = blocks_of_group(r);
      const int64_t begin = r.begin + group * each, end = at_most(begin + each, r.end);
      for (int64_t b = begin; b < end; b++) {
        const int64_t first = b * kVocabularyBlock;
        body(Block{b, first, at_most(kVocabularyBlock, vocabulary - first), group, b == begin}, memory);
      }
    }
  };
  parallel(threads, of_thread);
}

// One pass over the weights for each chunk, and one more: job.pass(before, next, number) makes the gradients of the
// chunk before, whose logits are still there, and the logits of the next. `alone`: there are no gradients, and nothing
// stays between passes.
template <class Job>
void over_chunks(Job& job, int64_t rows, int64_t chunk, bool alone) {
  int64_t number = 0;
  int before = -1;
  for (int64_t first = 0; first < rows || before >= 0; first += chunk, number++) {
    int next = -1;
    if (first < rows) {
      next = static_cast<int>(number % 2);
      job.pack(next, first, at_most(chunk, rows - first));
    }
    job.pass(before, next, number);
    before = alone ? -1 : next;
  }
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
