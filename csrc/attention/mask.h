// Which keys a query sees: the limits that skip whole blocks, and the rest written into the scores as -infinity.
#pragma once
#include "../common/exp.h"
#include "../common/simd.h"
#include "params.h"

namespace llmkern::LLMKERN_ISA {
namespace {

LLMKERN_INLINE float minus_infinity() { return -__builtin_inff(); }
LLMKERN_INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
LLMKERN_INLINE int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }

LLMKERN_INLINE float mask_value(const AttentionMask& m, int64_t offset) {
  switch (m.dtype) {
    case DType::boolean:
      return m.data[offset] ? 0 : minus_infinity();
    case DType::bf16:
      return load_one(reinterpret_cast<const Bf16*>(m.data) + offset);
    case DType::f16:
      return load_one(reinterpret_cast<const Fp16*>(m.data) + offset);
    default:
      return reinterpret_cast<const float*>(m.data)[offset];
  }
}

// The rules for the queries of one (b, h).
class HeadMask {
 public:
  HeadMask(const AttentionParams& p, int64_t b, int64_t h) : mask_(p.mask), keys_(p.keys) {
    const AttentionMask& m = mask_;
    if (m.lengths) {
      int64_t at = b * m.lengths_step;
      int64_t length = m.lengths_64 ? reinterpret_cast<const int64_t*>(m.lengths)[at]
                                    : reinterpret_cast<const int32_t*>(m.lengths)[at];
      keys_ = at_least(0, at_most(length, keys_));
    }
    diagonal_ = m.bottom_right ? keys_ - p.queries : 0;
    base_ = b * m.b + h * m.h;
    // A mask that is the same for all queries, as of padding: what it masks at the end need not be looked at.
    if (m.data && m.row == 0)
      while (keys_ > 0 && mask_value(m, base_ + (keys_ - 1) * m.key) == minus_infinity()) keys_--;
  }

  // No query in [0, row] sees a key at or past this one, but for the dense mask.
  int64_t limit(int64_t row) const { return mask_.causal ? at_least(0, at_most(keys_, row + diagonal_ + 1)) : keys_; }

  // No query before this one sees the key.
  int64_t first_row(int64_t key) const { return mask_.causal ? at_least(0, key - diagonal_) : 0; }

  // Applies the rules to the scores of a query and the keys [begin, begin + count), and sets those up
  // to the next multiple of kWidth to -infinity.
  void apply(float* s, int64_t row, int64_t begin, int count) const {
    int seen = static_cast<int>(at_least(0, at_most(count, limit(row) - begin)));
    if (mask_.data) apply_dense(s, row, begin, seen);
    Float none = broadcast(minus_infinity());
    for (int c = seen & -kWidth; c < count; c += kWidth)
      store(s + c, first(seen > c ? (seen - c < kWidth ? seen - c : kWidth) : 0, load(s + c), none));
  }

 private:
  void apply_dense(float* s, int64_t row, int64_t begin, int count) const {
    const AttentionMask& m = mask_;
    int64_t offset = base_ + row * m.row + begin * m.key;
    Float none = broadcast(minus_infinity());
    if (m.dtype == DType::boolean) {
      const uint8_t* data = reinterpret_cast<const uint8_t*>(m.data) + offset;
      int c = 0;
      if (m.key == 1)
        for (; c + kWidth <= count; c += kWidth) store(s + c, keep(data + c, load(s + c), none));
      for (; c < count; c++)
        if (!data[c * m.key]) s[c] = minus_infinity();
      return;
    }
    if (m.dtype == DType::bf16) return add_dense(s, reinterpret_cast<const Bf16*>(m.data) + offset, count);
    if (m.dtype == DType::f16) return add_dense(s, reinterpret_cast<const Fp16*>(m.data) + offset, count);
    add_dense(s, reinterpret_cast<const float*>(m.data) + offset, count);
  }

  template <class M>
  void add_dense(float* s, const M* data, int count) const {
    Float none = broadcast(minus_infinity());
    for (int c = 0; c < count; c += kWidth) {
      int n = count - c < kWidth ? count - c : kWidth;
      Float x;
      if (mask_.key == 1) {
        x = n == kWidth ? load(data + c) : load_first(data + c, n);
      } else {
        alignas(64) float gathered[kWidth] = {};
        for (int i = 0; i < n; i++) gathered[i] = load_one(data + (c + i) * mask_.key);
        x = load(gathered);
      }
      store(s + c, where_equal(x, none, none, add(x, load(s + c))));
    }
  }

  AttentionMask mask_;
  int64_t keys_, diagonal_, base_;
};

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
