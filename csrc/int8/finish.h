// From exact sums to results: scales, bias, activation function, residual, the dtype of the output.
#pragma once
#include "../common/exp.h"
#include "packed.h"
#include "quantize.h"

namespace llmkern::LLMKERN_ISA {

constexpr int kMostRows = 32;  // of a tile on any instruction set

// A chunk of rows, quantised, and all that its tiles read.
struct Work {
  const Layout* layout;
  const Low* low;
  const High* high;      // null: one digit
  const uint64_t* bits;  // rows x words
  const float* scales;   // rows, or rows x groups
  const int32_t* zeros;  // as scales
  const int32_t* high_sums;
  const int8_t* weights;
  const int32_t* weight_sums;  // panels x groups x kPanel
  const float* weight_scale;
  const float* bias;
  const char* residual;
  char* out;
  int64_t stride, words, residual_stride, out_stride;
  Activation activation;
  bool grouped, symmetric;
  bool simple;  // nothing behind the bias
  const int8_t* panel(int64_t p) const { return weights + p * layout->panel_bytes; }
};

LLMKERN_INLINE Float sigmoid(Float x) {  // both branches of 1 / (1 + e^-x) by e^-|x|
  Float e = exp_negative(sub(zero(), abs(x)));
  Float large = div(broadcast(1.0f), add(broadcast(1.0f), e));
  return where_less(x, zero(), mul(e, large), large);
}

LLMKERN_INLINE Float activate(Activation f, Float x) {
  switch (f) {
    case Activation::relu:
      return where_less(x, zero(), zero(), x);
    case Activation::gelu:
    case Activation::geglu: {
      Float half = mul(x, broadcast(0.5f));
      Float y = fma(half, erf(mul(x, broadcast(0.707106781f))), half);
      return where_equal(x, broadcast(-__builtin_inff()), zero(), y);
    }
    case Activation::gelu_tanh: {  // (1 + tanh y) / 2 is the sigmoid of 2 y
      Float cube = mul(mul(x, x), x);
      Float inner = mul(broadcast(1.59576912f), fma(broadcast(0.044715f), cube, x));
      return where_less(x, broadcast(-30.0f), zero(), mul(x, sigmoid(inner)));
    }
    case Activation::silu:
    case Activation::swiglu:
      return where_less(x, broadcast(-100.0f), zero(), mul(x, sigmoid(x)));
    default:
      return x;
  }
}

LLMKERN_INLINE Int load_sums(const int32_t* p) {
  Int sums;
  std::memcpy(&sums, p, sizeof sums);
  return sums;
}

// What is the same for all rows of vectors [first, first + vectors) of a panel.
struct Columns {
  int vectors;
  bool whole;             // every vector is full of outputs
  int count[kVectors];    // outputs of a vector
  int64_t out[kVectors];  // their first column of the result
  Float scale[kVectors], bias[kVectors];
  Int weight_sum[kVectors];
};
LLMKERN_INLINE Columns columns_of(const Work& w, int64_t panel, int first, int last) {
  const Layout& layout = *w.layout;
  Columns c;
  c.vectors = last - first, c.whole = true;
  for (int v = 0; v < c.vectors; v++) {
    const int n = layout.outputs_in(panel, first + v);
    const int64_t output = layout.first_output(panel, first + v);
    auto of = [&](const float* p) { return n == kWidth ? load(p + output) : n ? load_first(p + output, n) : zero(); };
    c.count[v] = n, c.whole = c.whole && n == kWidth, c.out[v] = output;
    c.scale[v] = w.grouped ? broadcast(1.0f) : of(w.weight_scale);
    c.bias[v] = w.bias ? of(w.bias) : zero();
    // Groups have sums of their own, and without k there are none.
    c.weight_sum[v] = w.grouped ? broadcast_int(0) : load_sums(w.weight_sums + (panel * kVectors + first + v) * kWidth);
  }
  return c;
}

template <class T>
LLMKERN_INLINE void put(const Work& w, int64_t row, const Columns& c, int v, Float y) {
  T* to = reinterpret_cast<T*>(w.out) + row * w.out_stride + c.out[v];
  if (c.whole || c.count[v] == kWidth)
    store(to, y);
  else if (c.count[v])
    store_first(to, y, c.count[v]);
}

// What comes behind the linear part `y`: rows of c.vectors vectors.
template <class T>
__attribute__((noinline)) void finish_rest(const Work& w, int64_t row, int rows, const Columns& c, const float* y) {
  const bool pairs = takes_pairs(w.activation);
  for (int i = 0; i < rows; i++, y += c.vectors * kWidth) {
    for (int v = 0; v < c.vectors; v += pairs ? 2 : 1) {
      const int n = c.count[v];
      if (n == 0) continue;
      Float value = activate(w.activation, load(y + v * kWidth));
      if (pairs) value = mul(value, load(y + (v + 1) * kWidth));
      if (w.residual) {
        const T* from = reinterpret_cast<const T*>(w.residual) + (row + i) * w.residual_stride + c.out[v];
        value = add(value, n == kWidth ? load(from) : load_first(from, n));
      }
      put<T>(w, row + i, c, v, value);
    }
  }
}

// What is the same for all outputs of a row.
struct RowTerms {
  Int zero_point, high_offset;
  Float scale;
};
template <int kOffset, bool kHigh>
LLMKERN_INLINE RowTerms terms_of(const Work& w, int64_t row) {
  RowTerms r;
  r.zero_point = broadcast_int(w.zeros[row]);
  r.high_offset = broadcast_int(kHigh && kOffset ? kOffset * w.high_sums[row] : 0);
  r.scale = broadcast(w.scales[row]);
  return r;
}
template <int kOffset, bool kHigh>
LLMKERN_INLINE Float linear_part(const RowTerms& r, Int weight_sum, Float scale, Float bias, const int32_t* low,
                                 const int32_t* high) {
  Float sum = to_float(sub(load_sums(low), mul(weight_sum, r.zero_point)));
  if (kHigh) {
    Int sums = load_sums(high);
    if (kOffset) sums = sub(sums, r.high_offset);
    sum = fma(to_float(sums), broadcast(256.0f), sum);
  }
  return add(mul(sum, mul(r.scale, scale)), bias);  // not in one rounding: the reference rounds twice
}

// `finish` where N vectors are whole and nothing follows the bias. kHigh: there are sums of high digits.
template <class T, int kOffset, int N, bool kHigh>
__attribute__((noinline)) void finish_plain(const Work& w, int64_t row, int rows, const Columns& c, const int32_t* low,
                                            const int32_t* high) {
  Float scale[N], bias[N];
  Int weight_sum[N];
  T* out[N];
  for (int v = 0; v < N; v++) {
    scale[v] = c.scale[v], bias[v] = c.bias[v], weight_sum[v] = c.weight_sum[v];
    out[v] = reinterpret_cast<T*>(w.out) + row * w.out_stride + c.out[v];
  }
  for (int i = 0; i < rows; i++) {
    const RowTerms r = terms_of<kOffset, kHigh>(w, row + i);
#pragma GCC unroll 8
    for (int v = 0; v < N; v++, low += kWidth, high += kHigh ? kWidth : 0)
      store(out[v] + i * w.out_stride, linear_part<kOffset, kHigh>(r, weight_sum[v], scale[v], bias[v], low, high));
  }
}

// Results of `rows` rows from the sums of low digits and, where `high` is not null, of high ones: rows of c.vectors
// vectors. kOffset: what dot_high adds (dot.h).
template <class T, int kOffset>
__attribute__((noinline)) void finish(const Work& w, int64_t row, int rows, const Columns& c, const int32_t* low,
                                      const int32_t* high) {
  if (w.simple && c.whole) {
    constexpr auto kHalf = kVectors / 2;
    if (high && c.vectors == kHalf) return finish_plain<T, kOffset, kHalf, true>(w, row, rows, c, low, high);
    if (high) return finish_plain<T, kOffset, kVectors, true>(w, row, rows, c, low, high);
    if (c.vectors == kHalf) return finish_plain<T, kOffset, kHalf, false>(w, row, rows, c, low, high);
    return finish_plain<T, kOffset, kVectors, false>(w, row, rows, c, low, high);
  }
  alignas(64) float rest[kMostRows * kPanel];
  for (int i = 0, at = 0; i < rows; i++) {
    const RowTerms r = high ? terms_of<kOffset, true>(w, row + i) : terms_of<kOffset, false>(w, row + i);
    for (int v = 0; v < c.vectors; v++, at += kWidth) {
      Float y = high ? linear_part<kOffset, true>(r, c.weight_sum[v], c.scale[v], c.bias[v], low + at, high + at)
                     : linear_part<kOffset, false>(r, c.weight_sum[v], c.scale[v], c.bias[v], low + at, high);
      if (w.simple)
        put<T>(w, row + i, c, v, y);
      else
        store(rest + at, y);
    }
  }
  if (!w.simple) finish_rest<T>(w, row, rows, c, rest);
}

// What is the same for all rows of vectors [first, last) of a panel in a group of k.
struct GroupColumns {
  int64_t group;
  Float scale[kVectors];
  Int weight_sum[kVectors];
};
LLMKERN_INLINE GroupColumns columns_of_group(const Work& w, int64_t panel, int first, int last, int64_t group) {
  const Layout& layout = *w.layout;
  GroupColumns c;
  c.group = group;
  for (int j = first; j < last; j++) {
    const int n = layout.outputs_in(panel, j);
    const float* at = w.weight_scale + group * layout.outputs + layout.first_output(panel, j);
    c.scale[j - first] = n == kWidth ? load(at) : n ? load_first(at, n) : zero();
    c.weight_sum[j - first] = load_sums(w.weight_sums + (panel * layout.groups + group) * kPanel + j * kWidth);
  }
  return c;
}

// add_group where the zero point is 128 everywhere (kSymmetric) or one for each row and group.
template <int N, bool kSymmetric>
__attribute__((noinline)) void add_group_of(const Work& w, int64_t row, int rows, const GroupColumns& c,
                                            const int32_t* sums, float* totals) {
  Float scale[N];
  Int weight_sum[N], zero_part[N];
  for (int v = 0; v < N; v++) {
    scale[v] = c.scale[v], weight_sum[v] = c.weight_sum[v];
    zero_part[v] = mul(weight_sum[v], broadcast_int(128 - kLowOffset));
  }
  const int64_t groups = w.layout->groups;
  for (int i = 0; i < rows; i++) {
    const int64_t at = (row + i) * groups + c.group;
    const Float row_scale = broadcast(w.scales[at]);
    const Int zero_point = broadcast_int(kSymmetric ? 0 : w.zeros[at]);
#pragma GCC unroll 8
    for (int v = 0; v < N; v++, sums += kWidth, totals += kWidth) {
      const Int sum = sub(load_sums(sums), kSymmetric ? zero_part[v] : mul(weight_sum[v], zero_point));
      // Not in one rounding, so that portable code, which has no such instruction, gives the same.
      store(totals, add(load(totals), mul(to_float(sum), mul(row_scale, scale[v]))));
    }
  }
}

// totals += the sums of a group, in units of what they stand for. Both: rows of N vectors.
template <int N>
LLMKERN_INLINE void add_group(const Work& w, int64_t row, int rows, const GroupColumns& c, const int32_t* sums,
                              float* totals) {
  if (w.symmetric) return add_group_of<N, true>(w, row, rows, c, sums, totals);
  add_group_of<N, false>(w, row, rows, c, sums, totals);
}

// Results from totals over groups, which have their scales: rows of c.vectors vectors.
template <class T>
__attribute__((noinline)) void finish_groups(const Work& w, int64_t row, int rows, const Columns& c, float* totals) {
  float* at = totals;
  for (int i = 0; i < rows; i++) {
    for (int v = 0; v < c.vectors; v++, at += kWidth) {
      Float y = add(load(at), c.bias[v]);
      if (w.simple)
        put<T>(w, row + i, c, v, y);
      else
        store(at, y);
    }
  }
  if (!w.simple) finish_rest<T>(w, row, rows, c, totals);
}

}  // namespace llmkern::LLMKERN_ISA
