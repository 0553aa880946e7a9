// Rows of activations as integers: u = round(x / scale) + zero, in one digit of 8 bits or two.
//
// Two passes over a row that is in the cache: its range, then the integers. All of it is exact or in one order on every
// instruction set, so that the integers are the same on all of them.
#pragma once
#include <cmath>
#include <cstring>

#include "dot.h"
#include "params.h"

namespace llmkern::LLMKERN_ISA {

constexpr int kLanes = 64;  // sums of a row's magnitudes: element k in lane k % 64
constexpr int kChains = kLanes / kWidth;
// Numbers up to this many times the mean magnitude of the row set its scale; those beyond are outliers, which take a
// second digit. A normal distribution has 2 of 10^6 of them; docs/int8.md shows the choice.
constexpr float kUsual = 6.0f;
constexpr float kMost = 32000.0f;            // of two digits, with room for the zero
constexpr float kSmallestScale = 0x1p-126f;  // a smaller one has no inverse
constexpr int64_t kBitsOfWord = 64 * kQuad;  // values of k in a word of `bits`

// Where a row's integers go, and what is known of it.
struct QuantizedRow {
  Low* low;
  High* high;      // null: one digit
  uint64_t* bits;  // for each quad of k whether a high digit is there; null with `high`
  float* scale;
  int32_t* zero;      // less kLowOffset
  int32_t* high_sum;  // of the high digits; with `high`
};

struct Extent {
  float least, most, mean;  // 0 lies between the first two
  float broken;             // NaN where an element is NaN or infinite, else 0
};

// kMean: the mean magnitude is wanted.
template <bool kMean, class T>
LLMKERN_INLINE Extent extent(const T* x, int64_t depth) {
  Float lo = zero(), hi = zero(), broken = zero(), magnitude[kChains];
  if (kMean)
    for (int i = 0; i < kChains; i++) magnitude[i] = zero();
  auto look = [&](Float a, Float& chain) {
    lo = min(a, lo);
    hi = max(a, hi);
    broken = fma(a, zero(), broken);
    if (kMean) chain = add(chain, abs(a));
  };
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes)
#pragma GCC unroll 16
    for (int i = 0; i < kChains; i++) look(load(x + k + i * kWidth), magnitude[i]);
  for (int i = 0; k < depth; i++, k += kWidth) {
    int rest = static_cast<int>(depth - k);
    look(rest >= kWidth ? load(x + k) : load_first(x + k, rest), magnitude[i]);
  }
  Extent e{-largest(sub(zero(), lo)), largest(hi), 0.0f, sum(broken)};
  if (kMean) {
    for (int half = kChains / 2; half > 0; half /= 2)
      for (int i = 0; i < half; i++) magnitude[i] = add(magnitude[i], magnitude[i + half]);
    alignas(64) float lane[kWidth];
    store(lane, magnitude[0]);
    for (int half = kWidth / 2; half > 0; half /= 2)
      for (int i = 0; i < half; i++) lane[i] += lane[i + half];
    e.mean = depth ? lane[0] / static_cast<float>(depth) : 0.0f;
  }
  return e;
}

LLMKERN_INLINE float usable(float scale) {
  if (scale < kSmallestScale) return 1.0f;
  return scale > 0x1.fffffep127f ? __builtin_nanf("") : scale;
}

struct Scale {
  float scale;
  int32_t zero;
};
LLMKERN_INLINE Scale choose(const QuantizeParams& q, const Extent& e) {
  float least = e.least, most = e.most, magnitude = -least > most ? -least : most;
  if (q.scaling == Scaling::given) return {q.given[0], static_cast<int32_t>(q.given[1])};
  if (q.scaling == Scaling::wide) return {usable(magnitude / kMost), 128};
  if (q.outliers) {
    float bound = kUsual * e.mean;
    least = least < -bound ? -bound : least;
    most = most > bound ? bound : most;
  }
  float scale = q.scaling == Scaling::symmetric ? (-least > most ? -least : most) / 127.0f : (most - least) / 255.0f;
  if (q.outliers && magnitude / kMost > scale) scale = magnitude / kMost;
  scale = usable(scale);
  if (q.scaling == Scaling::symmetric) return {scale, 128};
  float inverse = 1.0f / scale, shift = std::nearbyintf(-least * inverse);
  return {scale, shift >= 255.0f ? 255 : shift >= 0.0f ? static_cast<int32_t>(shift) : 0};
}

// Calls put(k, u) for vectors of kWidth integers; what is beyond `depth` is anything.
template <class T, class Put>
LLMKERN_INLINE void integers(const T* x, int64_t depth, Scale s, const Put& put) {
  Float factor = broadcast(1.0f / s.scale), most = broadcast(kMost), least = broadcast(-kMost);
  Int origin = broadcast_int(s.zero);
  auto quantized = [&](Float a) { return add(round_to_int(max(min(mul(a, factor), most), least)), origin); };
  int64_t k = 0;
  for (; k + kWidth <= depth; k += kWidth) put(k, quantized(load(x + k)));
  if (k < depth) put(k, quantized(load_first(x + k, static_cast<int>(depth - k))));
}

template <class T>
LLMKERN_INLINE bool has_high_digits(const QuantizeParams& q, const Extent& e, Scale s) {
  if (q.scaling == Scaling::wide) return true;
  float inverse = 1.0f / s.scale, origin = static_cast<float>(s.zero);
  return std::nearbyintf(e.most * inverse) + origin > 255.0f || std::nearbyintf(e.least * inverse) + origin < 0.0f;
}

// Writes the row up to the next multiple of 64 elements: beyond `depth` its high digits are 0, and its low digits meet
// weights of 0.
template <class T>
void quantize_row(const QuantizeParams& q, const T* x, int64_t depth, const QuantizedRow& row) {
  Extent e = q.outliers && q.scaling != Scaling::given ? extent<true>(x, depth) : extent<false>(x, depth);
  Scale s = choose(q, e);
  *row.scale = s.scale + e.broken;  // NaN here is all that makes such a row NaN
  *row.zero = s.zero - kLowOffset;
  if (!row.high) {
    integers(x, depth, s, [&](int64_t k, Int u) { store_low(row.low + k, u); });
    return;
  }
  int64_t filled = (depth + kLanes - 1) / kLanes * kLanes, words = (depth + kBitsOfWord - 1) / kBitsOfWord;
  std::memset(row.bits, 0, static_cast<size_t>(words) * 8);
  *row.high_sum = 0;
  if (!has_high_digits<T>(q, e, s)) {
    std::memset(row.high, 0, static_cast<size_t>(filled) * sizeof(High));
    integers(x, depth, s, [&](int64_t k, Int u) { store_low(row.low + k, u); });
    return;
  }
  integers(x, depth, s, [&](int64_t k, Int u) {
    store_digits(row.low + k, row.high + k, u);
    row.bits[k / kBitsOfWord] |= static_cast<uint64_t>(high_quads(u)) << (k % kBitsOfWord / kQuad);
  });
  std::memset(row.high + depth, 0, static_cast<size_t>(filled - depth) * sizeof(High));
  if (kHighOffset) {
    int32_t total = 0;
    for (int64_t k = 0; k < depth; k++) total += row.high[k];
    *row.high_sum = total;
  }
}

// The same with a scale for each group, zero = 128, one digit.
template <class T>
void quantize_groups(const QuantizeParams& q, const T* x, int64_t depth, Low* low, float* scales) {
  for (int64_t begin = 0, g = 0; begin < depth; begin += q.group, g++) {
    int64_t size = depth - begin < q.group ? depth - begin : q.group;
    Extent e = extent<false>(x + begin, size);
    Scale s = choose(q, e);
    scales[g] = s.scale + e.broken;
    // What a vector writes beyond its group, the next group writes over.
    integers(x + begin, size, s, [&](int64_t k, Int u) { store_low(low + begin + k, u); });
  }
}

// Hadamard's transform of `size` elements that lie kStride apart, orthonormal, for each of kStride places, over blocks
// of size * kStride elements: an outlier is spread over its block. Adding whole vectors, it needs no exchange in one.
constexpr int64_t kRotationStride = 16;
template <class T>
void rotate_row(const T* x, int64_t depth, int64_t size, float* out) {
  int64_t k = 0;
  for (; k + kWidth <= depth; k += kWidth) store(out + k, load(x + k));
  for (; k < depth; k++) out[k] = load_one(x + k);
  Float factor = broadcast(1.0f / std::sqrt(static_cast<float>(size)));
  for (int64_t block = 0; block + size * kRotationStride <= depth; block += size * kRotationStride) {
    for (int64_t half = 1; half < size; half *= 2)
      for (int64_t i = 0; i < size; i += 2 * half)
        for (int64_t j = i; j < i + half; j++)
          for (int64_t lane = 0; lane < kRotationStride; lane += kWidth) {
            float *p = out + block + j * kRotationStride + lane, *r = p + half * kRotationStride;
            Float a = load(p), b = load(r);
            store(p, add(a, b)), store(r, sub(a, b));
          }
    for (int64_t i = 0; i < size * kRotationStride; i += kWidth)
      store(out + block + i, mul(load(out + block + i), factor));
  }
}

}  // namespace llmkern::LLMKERN_ISA
