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
  const int32_t* zeros;
  const int32_t* high_sums;
  const int8_t* weights;
  const int32_t* weight_sums;  // panels x groups x kPanel
  const float* weight_scale;
  const float* bias;
  const char* residual;
  char* out;
  int64_t stride, words, residual_stride, out_stride;
  Activation activation;
  bool grouped, simple;  // simple: nothing behind the bias
  const int8_t* panel(int64_t p) const { return weights + p * layout->panel_bytes; }
};

LLMKERN_INLINE Float sigmoid(Float x) {  // both branches of 1 / (1 + e^-x) by e^-|x|
  Float e = exp_negative(sub(zero(), abs(x)));
  Float large = div(broadcast(1.0f), add(broadcast(1.0f), e));
  return where_less(x, zero(), mul(e, large), large);
}

// The error function, odd: x P(x^2) below 1, else 1 - e^(-x^2) Q(1 / (1 + x / 2)); both of least maximal error.
LLMKERN_INLINE Float erf(Float x) {
  Float size = abs(x), square = mul(x, x);
  Float p = fma(broadcast(-5.46292795e-4f), square, broadcast(4.87070325e-3f));
  p = fma(p, square, broadcast(-2.66638101e-2f));
  p = fma(p, square, broadcast(1.12780642e-1f));
  p = fma(p, square, broadcast(-3.76119390e-1f));
  p = fma(p, square, broadcast(1.12837892f));
  Float t = div(broadcast(1.0f), fma(size, broadcast(0.5f), broadcast(1.0f)));
  Float q = fma(broadcast(-3.87608258e-2f), t, broadcast(7.23656671e-1f));
  q = fma(q, t, broadcast(-6.14486404e-2f));
  q = fma(q, t, broadcast(3.92460099e-1f));
  q = fma(q, t, broadcast(-1.35062862e-2f));
  Float far = sub(broadcast(1.0f), mul(exp_negative(sub(zero(), square)), q));
  Float y = where_less(size, broadcast(1.0f), mul(size, p), far);
  return where_less(x, zero(), sub(zero(), y), y);
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

// What is the same for all rows of a vector of a panel.
struct Column {
  Float scale, bias;
  int count;
};
LLMKERN_INLINE Column column_of(const Work& w, int64_t panel, int j) {
  int n = w.layout->outputs_in(panel, j);
  int64_t first = w.layout->first_output(panel, j);
  Column c{broadcast(1.0f), zero(), n};
  if (n == 0) return c;
  if (!w.grouped) c.scale = n == kWidth ? load(w.weight_scale + first) : load_first(w.weight_scale + first, n);
  if (w.bias) c.bias = n == kWidth ? load(w.bias + first) : load_first(w.bias + first, n);
  return c;
}

template <class T>
LLMKERN_INLINE void put(const Work& w, int64_t row, int64_t column, int count, Float y) {
  T* to = reinterpret_cast<T*>(w.out) + row * w.out_stride + column;
  if (count == kWidth)
    store(to, y);
  else
    store_first(to, y, count);
}

// The rest, for vectors [first, last) of a panel, from their linear parts `y`: rows of last - first vectors.
template <class T>
__attribute__((noinline)) void finish_rest(const Work& w, int64_t row, int rows, int64_t panel, int first, int last,
                                           const float* y) {
  const bool pairs = takes_pairs(w.activation);
  for (int i = 0; i < rows; i++, y += (last - first) * kWidth) {
    for (int j = first; j < last; j += pairs ? 2 : 1) {
      int n = w.layout->outputs_in(panel, j);
      if (n == 0) continue;
      int64_t column = w.layout->first_output(panel, j);
      Float value = activate(w.activation, load(y + (j - first) * kWidth));
      if (pairs) value = mul(value, load(y + (j + 1 - first) * kWidth));
      if (w.residual) {
        const T* from = reinterpret_cast<const T*>(w.residual) + (row + i) * w.residual_stride + column;
        value = add(value, n == kWidth ? load(from) : load_first(from, n));
      }
      put<T>(w, row + i, column, n, value);
    }
  }
}

LLMKERN_INLINE Int load_sums(const int32_t* p) {
  Int sums;
  std::memcpy(&sums, p, sizeof sums);
  return sums;
}

// Results of `rows` rows and vectors [first, last) of a panel, from the sums of low digits and, where `high` is not
// null, of high ones: rows of last - first vectors. kOffset: what dot_high adds (dot.h).
template <class T, int kOffset>
__attribute__((noinline)) void finish(const Work& w, int64_t row, int rows, int64_t panel, int first, int last,
                                      const int32_t* low, const int32_t* high) {
  alignas(64) float rest[kMostRows * kPanel];
  const int64_t apart = (last - first) * kWidth;
  for (int j = first; j < last; j++) {
    Column c = column_of(w, panel, j);
    if (c.count == 0) continue;
    Int total = load_sums(w.weight_sums + panel * w.layout->groups * kPanel + j * kWidth);
    int64_t column = w.layout->first_output(panel, j), at = (j - first) * kWidth;
    for (int i = 0; i < rows; i++, at += apart) {
      Int exact = sub(load_sums(low + at), mul(total, broadcast_int(w.zeros[row + i])));
      Float sum = to_float(exact);
      if (high) {
        Int sums = load_sums(high + at);
        if (kOffset) sums = sub(sums, broadcast_int(kOffset * w.high_sums[row + i]));
        sum = fma(to_float(sums), broadcast(256.0f), sum);
      }
      Float y = mul(sum, mul(broadcast(w.scales[row + i]), c.scale));
      if (w.bias) y = add(y, c.bias);  // not with the product in one rounding: the reference rounds twice
      if (w.simple)
        put<T>(w, row + i, column, c.count, y);
      else
        store(rest + at, y);
    }
  }
  if (!w.simple) finish_rest<T>(w, row, rows, panel, first, last, rest);
}

// What is the same for all rows of vectors [first, last) of a panel in a group of k: scales, and what the activations'
// zero of 128 adds to a sum.
struct GroupColumns {
  int64_t group;
  int vectors;
  Float scale[kVectors];
  Int zero_part[kVectors];
};
LLMKERN_INLINE GroupColumns columns_of_group(const Work& w, int64_t panel, int first, int last, int64_t group) {
  const Layout& layout = *w.layout;
  GroupColumns c;
  c.group = group, c.vectors = last - first;
  for (int j = first; j < last; j++) {
    const int n = layout.outputs_in(panel, j);
    const float* at = w.weight_scale + group * layout.outputs + layout.first_output(panel, j);
    c.scale[j - first] = n == kWidth ? load(at) : n ? load_first(at, n) : zero();
    c.zero_part[j - first] = mul(load_sums(w.weight_sums + (panel * layout.groups + group) * kPanel + j * kWidth),
                                 broadcast_int(kLowOffset - 128));
  }
  return c;
}

// totals += the sums of a group, in units of what they stand for. Both: rows of c.vectors vectors.
LLMKERN_INLINE void add_group(const Work& w, int64_t row, int rows, const GroupColumns& c, const int32_t* sums,
                              float* totals) {
  for (int i = 0; i < rows; i++) {
    Float scale = broadcast(w.scales[(row + i) * w.layout->groups + c.group]);
    for (int j = 0; j < c.vectors; j++, sums += kWidth, totals += kWidth) {
      // Not in one rounding, so that portable code, which has no such instruction, gives the same.
      Float product = mul(to_float(add(load_sums(sums), c.zero_part[j])), mul(scale, c.scale[j]));
      store(totals, add(load(totals), product));
    }
  }
}

// Results from totals over groups, which have their scales: rows of last - first vectors.
template <class T>
__attribute__((noinline)) void finish_groups(const Work& w, int64_t row, int rows, int64_t panel, int first, int last,
                                             float* totals) {
  const int64_t apart = (last - first) * kWidth;
  for (int j = first; j < last; j++) {
    Column c = column_of(w, panel, j);
    int64_t column = w.layout->first_output(panel, j);
    for (int i = 0; i < rows; i++) {
      float* at = totals + i * apart + (j - first) * kWidth;
      Float y = w.bias ? add(load(at), c.bias) : load(at);
      if (!w.simple)
        store(at, y);
      else if (c.count)
        put<T>(w, row + i, column, c.count, y);
    }
  }
  if (!w.simple) finish_rest<T>(w, row, rows, panel, first, last, totals);
}

}  // namespace llmkern::LLMKERN_ISA
