// From exact sums to results: scales, bias, activation function, residual, the dtype of the output.
#pragma once
#include "../common/exp.h"
#include "packed.h"
#include "quantize.h"

namespace llmkern::LLMKERN_ISA {

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
  bool grouped;
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

template <class T>
LLMKERN_INLINE void put(const Work& w, int64_t row, int64_t column, int count, Float y) {
  T* to = reinterpret_cast<T*>(w.out) + row * w.out_stride + column;
  const T* residual = reinterpret_cast<const T*>(w.residual) + row * w.residual_stride + column;
  if (count == kWidth)
    store(to, w.residual ? add(y, load(residual)) : y);
  else
    store_first(to, w.residual ? add(y, load_first(residual, count)) : y, count);
}

// sums(i, j), a Float: the sum of row i of the tile and vector j of the panel without scales, of groups with them.
template <class T, int Rows, class Sums>
LLMKERN_INLINE void finish(const Work& w, int64_t row, int64_t panel, const Sums& sums) {
  const Layout& layout = *w.layout;
  const int last = takes_pairs(w.activation) ? kVectors / 2 : kVectors;
  Float scale[Rows];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; i++) scale[i] = broadcast(w.grouped ? 1.0f : w.scales[row + i]);
  struct Column {
    Float scale, bias;
  };
  auto column_of = [&](int j) {
    int64_t first = layout.first_output(panel, j);
    int n = static_cast<int>(layout.outputs_in(panel, j));
    Column c{broadcast(1.0f), zero()};
    if (!w.grouped) c.scale = n == kWidth ? load(w.weight_scale + first) : load_first(w.weight_scale + first, n);
    if (w.bias) c.bias = n == kWidth ? load(w.bias + first) : load_first(w.bias + first, n);
    return c;
  };
  auto linear = [&](int i, int j, const Column& c) {
    Float y = sums(i, j);
    if (!w.grouped) y = mul(y, mul(scale[i], c.scale));
    return w.bias ? add(y, c.bias) : y;  // not with the product in one rounding: the reference rounds twice
  };
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; j++) {
    int n = static_cast<int>(layout.outputs_in(panel, j));
    if (j >= last || n == 0) continue;
    int64_t column = layout.first_output(panel, j);
    Column c = column_of(j);
    if (w.activation == Activation::none) {
#pragma GCC unroll 8
      for (int i = 0; i < Rows; i++) put<T>(w, row + i, column, n, linear(i, j, c));
    } else if (last == kVectors) {
#pragma GCC unroll 8
      for (int i = 0; i < Rows; i++) put<T>(w, row + i, column, n, activate(w.activation, linear(i, j, c)));
    } else {
      constexpr int kHalf = kVectors / 2;
      const int other = j < kHalf ? j + kHalf : j;
      Column d = column_of(other);
#pragma GCC unroll 8
      for (int i = 0; i < Rows; i++)
        put<T>(w, row + i, column, n, mul(activate(w.activation, linear(i, j, c)), linear(i, other, d)));
    }
  }
}

}  // namespace llmkern::LLMKERN_ISA
