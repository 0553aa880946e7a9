// Which keys the rules other than a dense mask leave to a query: an interval, for the CPU and CUDA alike. That of a
// later query never begins or ends before that of an earlier one, so that two queries answer for all between them, and
// whole blocks of keys are skipped or need no look at their single scores.
#pragma once
#include "../common/arithmetic.h"
#include "params.h"

#ifdef __CUDACC__
namespace llmkern::device {
#else
namespace llmkern::LLMKERN_ISA {
#endif
namespace {

template <class Int>
LLMKERN_INLINE Int between_0_and(Int most, Int x) {
  return x < 0 ? 0 : x < most ? x : most;
}

// How many of some keys a query sees.
enum class Seen { none, some, all };

template <class Int>
struct KeyLimits {
  Int keys;         // those from here on do not exist
  Int diagonal;     // query i stands at the place of key i + diagonal
  Int left, right;  // as AttentionMask has them
};

// Those of sequence b, which has so many queries and keys.
LLMKERN_INLINE KeyLimits<int64_t> key_limits(const AttentionMask& m, int64_t b, int64_t queries, int64_t keys) {
  if (m.lengths) keys = between_0_and(keys, integer(m.lengths, m.lengths_64, b * m.lengths_step) + m.lengths_more);
  return {keys, m.bottom_right ? keys - queries : 0, m.left, m.right};
}
// The same in 32 bits, for at most kMostRows queries and keys; an open side is as wide as there is need for.
constexpr int64_t kMostRows = 1 << 28;
LLMKERN_INLINE KeyLimits<int> narrow_limits(const KeyLimits<int64_t>& l) {
  return {static_cast<int>(l.keys), static_cast<int>(l.diagonal), static_cast<int>(at_most(l.left, 2 * kMostRows)),
          static_cast<int>(at_most(l.right, 2 * kMostRows))};
}

// No query up to `row` sees a key at or past this one.
template <class Int>
LLMKERN_INLINE Int key_limit(const KeyLimits<Int>& l, Int row) {
  return between_0_and(l.keys, row + l.diagonal + l.right + 1);
}
// No query from `row` on sees a key before this one.
template <class Int>
LLMKERN_INLINE Int key_start(const KeyLimits<Int>& l, Int row) {
  return between_0_and(l.keys, row + l.diagonal - l.left);
}
// What the queries from `first` to `last` see of the keys [begin, end).
template <class Int>
LLMKERN_INLINE Seen look_at_block(const KeyLimits<Int>& l, Int first, Int last, Int begin, Int end) {
  if (end <= key_start(l, first) || key_limit(l, last) <= begin) return Seen::none;
  return key_start(l, last) <= begin && end <= key_limit(l, first) ? Seen::all : Seen::some;
}

}  // namespace
#ifdef __CUDACC__
}  // namespace llmkern::device
#else
}  // namespace llmkern::LLMKERN_ISA
#endif
