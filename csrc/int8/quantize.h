// Rows of activations as integers: u = round(x / scale) + zero, in one digit of 8 bits or two.
//
// Two passes over rows that are in the cache: their ranges, then the integers. All of it is exact or in one order on
// every instruction set, so that the integers are the same on all of them.
#pragma once
#include <cmath>
#include <cstring>

#include "dot.h"
#include "params.h"

namespace llmkern::LLMKERN_ISA {

constexpr int kLanes = 64;  // sums of a row's magnitudes: element k in lane k % 64
static_assert(kLanes == kRun * kWidth);
// Numbers up to this many times the mean magnitude of the row set its scale; those beyond are outliers, which take a
// second digit. A normal distribution has 2 of 10^6 of them; docs/int8.md shows the choice.
constexpr float kUsual = 6.0f;
constexpr float kMost = 32000.0f;            // of two digits, with room for the zero
constexpr float kSmallestScale = 0x1p-126f;  // a smaller one has no inverse
constexpr int64_t kBitsOfWord = 64 * kQuad;  // values of k in a word of `bits`

// Where a row's integers go, and what is known of it.
struct QuantizedRow {
  Low* low;
  High* high;         // null: one digit
  uint64_t* bits;     // for each quad of k whether a high digit is there; null with `high`
  float* scale;       // one, or one for each group
  int32_t* zero;      // as many, less kLowOffset
  int32_t* high_sum;  // of the high digits; with `high`
};

struct Extent {
  float least, most, mean;  // 0 lies between the first two
  float broken;             // NaN where an element is NaN or infinite, else 0
};

// NaN where an element is NaN or infinite, else 0.
template <class T>
__attribute__((noinline)) float broken(const T* x, int64_t depth) {
  Float found = zero();
  int64_t k = 0;
  for (; k + kWidth <= depth; k += kWidth) found = fma(load(x + k), zero(), found);
  if (k < depth) found = fma(load_first(x + k, static_cast<int>(depth - k)), zero(), found);
  return sum(found);
}

// kMean: the mean magnitude is wanted.
template <bool kMean, class T>
LLMKERN_INLINE Extent extent(const T* x, int64_t depth) {
  constexpr int kPaths = 2;  // as many as keep the units for minima and maxima busy
  Float lo[kPaths], hi[kPaths], unusual[kPaths], magnitude[kRun];
  for (int i = 0; i < kPaths; i++) lo[i] = hi[i] = unusual[i] = zero();
  for (int i = 0; i < kRun; i++) magnitude[i] = zero();
  auto look = [&](Float a, int i) {
    lo[i % kPaths] = min(a, lo[i % kPaths]);
    hi[i % kPaths] = max(a, hi[i % kPaths]);
    if (kMean)
      magnitude[i] = add(magnitude[i], abs(a));
    else
      unusual[i % kPaths] = fma(a, zero(), unusual[i % kPaths]);
  };
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes)
#pragma GCC unroll 16
    for (int i = 0; i < kRun; i++) look(load(x + k + i * kWidth), i);
#pragma GCC unroll 16
  for (int i = 0; i < kRun; i++, k += kWidth) {
    if (k >= depth) break;
    int rest = static_cast<int>(depth - k);
    look(rest >= kWidth ? load(x + k) : load_first(x + k, rest), i);
  }
  Extent e{-largest(sub(zero(), min(lo[0], lo[1]))), largest(max(hi[0], hi[1])), 0.0f, 0.0f};
  if (!kMean) {
    e.broken = sum(add(unusual[0], unusual[1]));
    return e;
  }
  for (int half = kRun / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) magnitude[i] = add(magnitude[i], magnitude[i + half]);
  alignas(64) float lane[kWidth];
  store(lane, magnitude[0]);
  for (int half = kWidth / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) lane[i] += lane[i + half];
  e.mean = depth ? lane[0] / static_cast<float>(depth) : 0.0f;
  if (!(e.mean <= 0x1.fffffep127f)) e.broken = broken(x, depth);  // else no element can be
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
  if (q.scaling == Scaling::given) {
    const float zero_point = q.given[1];
    return {q.given[0], zero_point > 0.0f ? static_cast<int32_t>(zero_point < 255.0f ? zero_point : 255.0f) : 0};
  }
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

// One vector of x as integers. kGiven: the scale says nothing of their range, which is cut off.
template <bool kGiven>
LLMKERN_INLINE Int integer(Float x, Float factor, Int origin) {
  x = mul(x, factor);
  if (kGiven) x = max(min(x, broadcast(kMost)), broadcast(-kMost));
  return add(round_to_int(x), origin);
}

// The low digits of a row, up to the next multiple of kWidth: what is beyond `depth` is anything. `next`, as long as
// the row, is asked for meanwhile.
template <bool kGiven, class T>
void put_lows(const T* x, int64_t depth, Scale s, Low* low, const T* next) {
  const Float factor = broadcast(1.0f / s.scale);
  const Int origin = broadcast_int(s.zero);
  constexpr int kLine = 64 / sizeof(T);
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) {
    Int u[kRun];
#pragma GCC unroll 16
    for (int i = 0; i < kRun; i++) u[i] = integer<kGiven>(load(x + k + i * kWidth), factor, origin);
    store_lows(low + k, u);
#pragma GCC unroll 4
    for (int i = 0; i < kLanes; i += kLine) __builtin_prefetch(next + k + i);
  }
  for (; k < depth; k += kWidth) {
    const int rest = static_cast<int>(depth - k);
    store_low(low + k, integer<kGiven>(rest >= kWidth ? load(x + k) : load_first(x + k, rest), factor, origin));
  }
}

// The sum of high digits, `count` of them, a multiple of 64: of bytes where it is asked for.
LLMKERN_INLINE int32_t sum_of_digits(const High* digits, int64_t count) {
  Int sums = broadcast_int(0);
  for (int64_t k = 0; k < count; k += kWidth * kDotDepth)
    sums = dot(sums, broadcast_int(0x01010101), load_weights(reinterpret_cast<const int8_t*>(digits + k)));
  int32_t lane[kWidth], total = 0;
  std::memcpy(lane, &sums, sizeof sums);
  for (int i = 0; i < kWidth; i++) total += lane[i];
  return total;
}

// Both digits of a row, and where there are high ones; beyond `depth` its high digits up to the next multiple of 64 are
// 0.
template <bool kGiven, class T>
void put_digits(const T* x, int64_t depth, Scale s, const QuantizedRow& row) {
  const Float factor = broadcast(1.0f / s.scale);
  const Int origin = broadcast_int(s.zero);
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) {
    Int u[kRun];
#pragma GCC unroll 16
    for (int i = 0; i < kRun; i++) u[i] = integer<kGiven>(load(x + k + i * kWidth), factor, origin);
    const uint64_t quads = static_cast<uint64_t>(store_both(row.low + k, row.high + k, u));
    row.bits[k / kBitsOfWord] |= quads << (k % kBitsOfWord / kQuad);
  }
  const int64_t filled = (depth + kLanes - 1) / kLanes * kLanes;
  for (; k < depth; k += kWidth) {
    const int rest = static_cast<int>(depth - k);
    Int u = integer<kGiven>(rest >= kWidth ? load(x + k) : load_first(x + k, rest), factor, origin);
    store_digits(row.low + k, row.high + k, u);
    row.bits[k / kBitsOfWord] |= static_cast<uint64_t>(high_quads(u)) << (k % kBitsOfWord / kQuad);
  }
  std::memset(row.high + depth, 0, static_cast<size_t>(filled - depth) * sizeof(High));
  if (kHighOffset) *row.high_sum = sum_of_digits(row.high, filled);
}

template <class T>
LLMKERN_INLINE bool has_high_digits(const QuantizeParams& q, const Extent& e, Scale s) {
  if (q.scaling == Scaling::wide) return true;
  float inverse = 1.0f / s.scale, origin = static_cast<float>(s.zero);
  return std::nearbyintf(e.most * inverse) + origin > 255.0f || std::nearbyintf(e.least * inverse) + origin < 0.0f;
}

struct Found {
  Extent extent;
  Scale scale;
};

template <class T>
Found look_at(const QuantizeParams& q, const T* x, int64_t depth) {
  Found f;
  f.extent = q.outliers && q.scaling != Scaling::given ? extent<true>(x, depth) : extent<false>(x, depth);
  f.scale = choose(q, f.extent);
  return f;
}

// Writes the row up to the next multiple of kWidth, and its high digits, which are 0 beyond `depth`, to that of 64.
// What lies behind the low digits is anything: it meets weights of 0. `next`: as for put_lows.
template <class T>
void put_row(const QuantizeParams& q, const T* x, int64_t depth, const Found& f, const QuantizedRow& row,
             const T* next) {
  const Scale s = f.scale;
  const bool given = q.scaling == Scaling::given;
  *row.scale = s.scale + f.extent.broken;  // NaN here is all that makes such a row NaN
  *row.zero = s.zero - kLowOffset;
  auto lows = [&] { given ? put_lows<true>(x, depth, s, row.low, next) : put_lows<false>(x, depth, s, row.low, next); };
  if (!row.high) return lows();
  int64_t filled = (depth + kLanes - 1) / kLanes * kLanes, words = (depth + kBitsOfWord - 1) / kBitsOfWord;
  std::memset(row.bits, 0, static_cast<size_t>(words) * 8);
  *row.high_sum = 0;
  if (!has_high_digits<T>(q, f.extent, s)) {
    std::memset(row.high, 0, static_cast<size_t>(filled) * sizeof(High));
    return lows();
  }
  given ? put_digits<true>(x, depth, s, row) : put_digits<false>(x, depth, s, row);
}

// The same with a scale and zero for each group, one digit.
template <class T>
void quantize_groups(const QuantizeParams& q, const T* x, int64_t depth, const QuantizedRow& row) {
  for (int64_t begin = 0, g = 0; begin < depth; begin += q.group, g++) {
    int64_t size = depth - begin < q.group ? depth - begin : q.group;
    Extent e = extent<false>(x + begin, size);
    Scale s = choose(q, e);
    row.scale[g] = s.scale + e.broken, row.zero[g] = s.zero - kLowOffset;
    put_lows<false>(x + begin, size, s, row.low + begin, x + begin + q.group);  // and beyond, where the next will write
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
