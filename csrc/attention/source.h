// The rows of keys or values that a sequence has: as they lie, or out of the pages and the 8 bits of a cache.
#pragma once
#include "../common/tile.h"
#include "sequence.h"

namespace llmkern::LLMKERN_ISA {
namespace {

template <class T>
struct Slice {
  const T* data;
  int64_t step;
};

// Of (sequence, key head).
template <class T>
class Source {
 public:
  Source(const AttentionParams& p, const AttentionTensor& t, const AttentionScales& scales, const Sequence& s,
         int64_t h, int64_t width)
      : tensor_(t), scales_(scales), pages_(p.pages), b_(s.b), h_(h), width_(width) {
    if (!scattered()) rows_ = keys_of<T>(t, s, h);
  }
  // Whether rows must be gathered, at most kGather at a time.
  bool scattered() const { return pages_.table || scales_.data; }
  static constexpr int64_t kGather = 64;
  static_assert(kGather % kPanel == 0, "what is gathered is packed into whole panels");

  // The rows [begin, end). Gathered ones lie in `space`, units(width) of it.
  Slice<T> rows(int64_t begin, int64_t end, float* space) const {
    if (!scales_.data && (!pages_.table || begin / pages_.size == (end - 1) / pages_.size)) return run(begin);
    T* to = reinterpret_cast<T*>(space);
    for (int64_t r = begin; r < end; r++, to += width_) {
      if (scales_.data)
        widen(to, reinterpret_cast<const int8_t*>(tensor_.data) + at(tensor_, r), scales_.data[at(scales_, r)]);
      else
        std::memcpy(to, reinterpret_cast<const T*>(tensor_.data) + at(tensor_, r), sizeof(T) * size_t(width_));
    }
    return {reinterpret_cast<const T*>(space), width_};
  }
  static int64_t units(int64_t width) { return kGather * width; }
  // Whether every kGather rows from a multiple of it on lie in one run, as elements of T.
  bool in_runs() const { return !scales_.data && (!pages_.table || pages_.size % kGather == 0); }
  // The run that begins with this row: to the end of its page, or of the sequence.
  Slice<T> run(int64_t begin) const {
    if (!pages_.table) return {rows_ + begin * tensor_.row, tensor_.row};
    return {reinterpret_cast<const T*>(tensor_.data) + at(tensor_, begin), tensor_.row};
  }

 private:
  // Where row r is, in a tensor or its scales.
  template <class Strides>
  int64_t at(const Strides& t, int64_t r) const {
    if (!pages_.table) return b_ * t.b + h_ * t.h + r * t.row;
    int64_t page = integer(pages_.table, pages_.is_64, b_ * pages_.step + r / pages_.size);
    return page * t.b + h_ * t.h + r % pages_.size * t.row;
  }
  void widen(T* to, const int8_t* from, float scale) const {
    Float by = broadcast(scale);
    int64_t d = 0;
    for (; d + 2 * kWidth <= width_; d += 2 * kWidth) {
      Float a = mul(load(from + d), by), b = mul(load(from + d + kWidth), by);
      if constexpr (kPairs<T>)  // which are multiplied without subnormal numbers anyway
        store_flushed(to + d, a, b);
      else
        store(to + d, a), store(to + d + kWidth, b);
    }
    alignas(64) float some[2 * kWidth] = {};
    for (int i = 0; d + i < width_; i++) some[i] = from[d + i];
    for (int64_t at = 0; d < width_; d += kWidth, at += kWidth)
      store_first(to + d, mul(load(some + at), by), static_cast<int>(width_ - d < kWidth ? width_ - d : kWidth));
  }

  const AttentionTensor& tensor_;
  const AttentionScales& scales_;
  const AttentionPages& pages_;
  int64_t b_, h_, width_;
  const T* rows_ = nullptr;
};

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
