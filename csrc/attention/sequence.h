// One sequence of a batch: its queries and keys, which lie in a row of the batch or end to end with the others.
#pragma once
#include <cstring>

#include "../common/simd.h"
#include "params.h"

namespace llmkern::LLMKERN_ISA {
namespace {

struct Sequence {
  Sequence(const AttentionParams& p, int64_t b) : b(b), queries(p.queries), keys(p.keys) {
    of(p.query_bounds, first_query, queries);
    of(p.key_bounds, first_key, keys);
  }
  int64_t b, queries, keys;
  int64_t first_query = 0, first_key = 0;

  // Where numbers for each query of head h begin, in the order of the log-sum-exp.
  int64_t row(const AttentionParams& p, int64_t h) const {
    return p.query_bounds.data ? h * p.query_bounds.total + first_query : (b * p.heads + h) * p.queries;
  }

 private:
  void of(const AttentionBounds& bounds, int64_t& first, int64_t& count) const {
    if (!bounds.data) return;
    first = integer(bounds.data, bounds.is_64, b);
    count = integer(bounds.data, bounds.is_64, b + 1) - first;
  }
};

template <class T>
const T* queries_of(const AttentionTensor& t, const Sequence& s, int64_t h) {
  return reinterpret_cast<const T*>(t.data) + s.b * t.b + h * t.h + s.first_query * t.row;
}
template <class T>
const T* keys_of(const AttentionTensor& t, const Sequence& s, int64_t h) {
  return reinterpret_cast<const T*>(t.data) + s.b * t.b + h * t.h + s.first_key * t.row;
}

// The queries or keys of all sequences cut into pieces of `size`, numbered; a number may stand for an empty piece.
class Pieces {
 public:
  Pieces(const AttentionBounds& bounds, int64_t batch, int64_t longest, int64_t size)
      : bounds_(bounds), batch_(batch), each_((longest + size - 1) / size), size_(size) {}
  int64_t count() const { return first(batch_); }
  // The number of the first piece of sequence b.
  int64_t first(int64_t b) const {
    return bounds_.data ? integer(bounds_.data, bounds_.is_64, b) / size_ + b : b * each_;
  }
  // The sequence that piece i belongs to.
  int64_t sequence(int64_t i) const {
    if (!bounds_.data) return i / each_;
    int64_t low = 0, high = batch_;  // first(low) <= i < first(high)
    while (high - low > 1) {
      int64_t middle = (low + high) / 2;
      (first(middle) <= i ? low : high) = middle;
    }
    return low;
  }

 private:
  AttentionBounds bounds_;
  int64_t batch_, each_, size_;
};

// How many queries make a piece of work: `most`, halved down to about `least` where else the last pieces would keep few
// threads busy.
inline int64_t rows_of_task(const AttentionParams& p, int64_t most, int64_t least, int threads) {
  while (most > least && Pieces(p.query_bounds, p.batch, p.queries, most).count() * p.heads < 4 * threads) most /= 2;
  return most;
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
