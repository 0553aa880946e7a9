// Which keys a query sees: the limits that skip whole blocks, and the rest written into the scores as -infinity. Also
// what else is done to the scores of a query, and which of its weights are dropped.
#pragma once
#include <cstring>

#include "../common/exp.h"
#include "../common/philox.h"
#include "../common/simd.h"
#include "key_limits.h"
#include "sequence.h"

namespace llmkern::LLMKERN_ISA {
namespace {

LLMKERN_INLINE float minus_infinity() { return -__builtin_inff(); }

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
  HeadMask() = default;
  HeadMask(const AttentionParams& p, const Sequence& s, int64_t h)
      : mask_(p.mask), limits_(key_limits(p.mask, s.b, s.queries, s.keys)) {
    const AttentionMask& m = mask_;
    int64_t b = s.b;
    softcap_ = p.softcap;
    slope_ = p.alibi ? p.alibi[b * p.alibi_b + h * p.alibi_h] : 0;
    has_alibi_ = p.alibi != nullptr;
    drop_below_ = p.drop_below, head_ = static_cast<uint32_t>(b * p.heads + h);
    seed_ = p.drop_below ? static_cast<uint64_t>(*p.seed) : 0;
    base_ = b * m.b + h * m.h;
    // A mask that is the same for all queries, as of padding: what it masks at the end need not be looked at.
    if (m.data && m.row == 0)
      while (limits_.keys > 0 && mask_value(m, base_ + (limits_.keys - 1) * m.key) == minus_infinity()) limits_.keys--;
  }

  // No query up to `row` sees a key at or past this one, but for the dense mask.
  int64_t limit(int64_t row) const { return key_limit(limits_, row); }
  // No query from `row` on sees a key before this one.
  int64_t start(int64_t row) const { return key_start(limits_, row); }
  // No query before this one sees the key; none from row_limit on does.
  int64_t first_row(int64_t key) const {
    return mask_.right == kUnbounded ? 0 : at_least(0, key - limits_.diagonal - mask_.right);
  }
  int64_t row_limit(int64_t key) const {
    return mask_.left == kUnbounded ? INT64_MAX : at_least(0, key - limits_.diagonal + mask_.left + 1);
  }

  bool dense() const { return mask_.data != nullptr; }
  // Whether the scores themselves are changed, which must be scaled before.
  bool changes_scores() const { return (dense() && mask_.dtype != DType::boolean) || softcap_ != 0 || has_alibi_; }

  // What the rules say of a query and the keys [begin, end): `some` also where finding out would take long.
  Seen look(int64_t row, int64_t begin, int64_t end) const {
    int64_t from = start(row), to = limit(row);
    if (end <= from || to <= begin) return Seen::none;
    bool inside = from <= begin && end <= to;
    if (!mask_.data) return inside ? Seen::all : Seen::some;
    Seen dense = look_dense(row, at_least(from, begin), at_most(to, end));
    return dense == Seen::all && !inside ? Seen::some : dense;
  }

  // Soft cap and ALiBi: what comes before the mask. With `slopes`, what a score's gradient is to be multiplied by.
  void bend(float* s, int64_t row, int64_t begin, int count, float* slopes = nullptr) const {
    if (softcap_ != 0) {
      Float cap = broadcast(softcap_), inverse = broadcast(1 / softcap_), one = broadcast(1);
      for (int c = 0; c < count; c += kWidth) {
        Float t = tanh(mul(load(s + c), inverse));
        store(s + c, mul(t, cap));
        if (slopes) store(slopes + c, sub(one, mul(t, t)));
      }
    }
    if (!has_alibi_) return;
    alignas(64) float lane[kWidth];
    for (int i = 0; i < kWidth; i++) lane[i] = static_cast<float>(i);
    Float slope = broadcast(-slope_), lanes = load(lane);
    for (int c = 0; c < count; c += kWidth) {
      Float distance = abs(add(broadcast(static_cast<float>(begin + c - row - limits_.diagonal)), lanes));
      store(s + c, fma(slope, distance, load(s + c)));
    }
  }
  bool bends() const { return softcap_ != 0 || has_alibi_; }
  bool caps() const { return softcap_ != 0; }

  // kept[c] for the keys [begin, begin + count), begin a multiple of 4: 0 where the weight is dropped, else 1. Writes
  // up to the next multiple of 64.
  bool drops() const { return drop_below_ != 0; }
  void kept(float* kept, int64_t row, int64_t begin, int count) const {
    uint32_t words[4 * kPhiloxGroups];
    for (int c = 0; c < count; c += 4 * kPhiloxGroups) {
      philox(seed_, static_cast<uint32_t>((begin + c) / 4), static_cast<uint32_t>(row), head_, 0, words);
      for (int i = 0; i < 4 * kPhiloxGroups; i++) kept[c + i] = words[i] < drop_below_ ? 0.0f : 1.0f;
    }
  }

  // Applies the rules to the scores of a query and the keys [begin, begin + count), and sets those up
  // to the next multiple of kWidth to -infinity.
  void apply(float* s, int64_t row, int64_t begin, int count) const {
    int seen = static_cast<int>(at_least(0, at_most(count, limit(row) - begin)));
    if (mask_.data) apply_dense(s, row, begin, seen);
    Float none = broadcast(minus_infinity());
    for (int c = seen & -kWidth; c < count; c += kWidth)
      store(s + c, first(seen > c ? (seen - c < kWidth ? seen - c : kWidth) : 0, load(s + c), none));
    int64_t unseen = at_most(count, start(row) - begin);
    for (int c = 0; c < unseen; c += kWidth)
      store(s + c, first(static_cast<int>(at_most(kWidth, unseen - c)), none, load(s + c)));
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

  Seen look_dense(int64_t row, int64_t begin, int64_t end) const {
    const AttentionMask& m = mask_;
    int64_t offset = base_ + row * m.row + begin * m.key;
    if (m.key == 0) {
      float x = mask_value(m, offset);
      return x == minus_infinity() ? Seen::none : x == 0 ? Seen::all : Seen::some;
    }
    if (m.key != 1) return Seen::some;
    if (m.dtype == DType::boolean) {
      const uint8_t* data = reinterpret_cast<const uint8_t*>(m.data) + offset;
      uint64_t any = 0, all = kOnes;
      int64_t c = 0, count = end - begin;
      for (; c + 8 <= count; c += 8) {
        uint64_t eight;
        std::memcpy(&eight, data + c, 8);
        any |= eight, all &= eight;
      }
      for (; c < count; c++) any |= data[c], all &= data[c] | ~uint64_t{0xff};
      return !any ? Seen::none : all == kOnes ? Seen::all : Seen::some;
    }
    if (m.dtype == DType::bf16) return look_added(reinterpret_cast<const Bf16*>(m.data) + offset, end - begin);
    if (m.dtype == DType::f16) return look_added(reinterpret_cast<const Fp16*>(m.data) + offset, end - begin);
    return look_added(reinterpret_cast<const float*>(m.data) + offset, end - begin);
  }
  static constexpr uint64_t kOnes = 0x0101010101010101u;  // eight bytes of a boolean mask, all seen

  template <class M>
  static Seen look_added(const M* data, int64_t count) {
    Float none = broadcast(minus_infinity()), seen = zero(), one = broadcast(1);
    int64_t c = 0;
    for (; c + kWidth <= count; c += kWidth) seen = where_equal(load(data + c), none, seen, one);
    if (c < count) {
      int n = static_cast<int>(count - c);
      seen = where_equal(first(n, load_first(data + c, n), none), none, seen, one);
    }
    return largest(seen) == 0 ? Seen::none : Seen::some;
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
  KeyLimits<int64_t> limits_{};
  int64_t base_;
  float softcap_, slope_;
  bool has_alibi_;
  uint32_t drop_below_, head_;
  uint64_t seed_;
};

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
