// e^x for x <= 0 and tanh, for softmax: a power of two by integer addition, times a polynomial on [-1/2, 1/2] for 2^f
// (Cody and Waite, Software Manual for the Elementary Functions, chapter 6).
#pragma once
#include "simd.h"

namespace llmkern::LLMKERN_ISA {

// 1 at 0, NaN at NaN, 0 at -infinity unless kInfinite is false, which is a little quicker; below -87.3 as there (e^x is
// then below every normal number). Relative error below 2^-23, or below 2^-13 where kQuick (enough for what is rounded
// to bf16 next).
template <bool kQuick = false, bool kInfinite = true>
LLMKERN_INLINE Float exp_negative(Float given) {
  const Float least = broadcast(-87.3f);
  const Float magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
  const Float log2e = broadcast(1.44269502f);
  Float x = max(least, given);  // the second operand where it is NaN
  Float t = fma(x, log2e, magic);
  Float f = fma(x, log2e, sub(magic, t));
  Float y;
  if constexpr (kQuick) {
    y = fma(broadcast(5.500892383e-02f), f, broadcast(2.422109595e-01f));
    y = fma(y, f, broadcast(6.932829283e-01f));
  } else {
    f = fma(x, broadcast(1.92596303e-8f), f);  // what log2(e) has beyond a float
    y = fma(broadcast(1.534580806e-4f), f, broadcast(1.339993090e-3f));
    y = fma(y, f, broadcast(9.618489072e-3f));
    y = fma(y, f, broadcast(5.550328642e-2f));
    y = fma(y, f, broadcast(2.402264625e-1f));
    y = fma(y, f, broadcast(6.931471825e-1f));
  }
  y = fma(y, f, broadcast(1.0f));
  y = as_float(add(as_int(y), shift_left<23>(as_int(t))));
  if constexpr (!kInfinite) return y;
  return where_equal(given, broadcast(-__builtin_inff()), zero(), y);
}

// Relative error below 2^-22; NaN at NaN. By a polynomial in x^2 where 1 - e^(-2 |x|) would lose digits.
LLMKERN_INLINE Float tanh(Float x) {
  Float size = abs(x), square = mul(x, x);
  Float y = fma(broadcast(1.8897848e-3f), square, broadcast(-7.8745838e-3f));
  y = fma(y, square, broadcast(2.1566206e-2f));
  y = fma(y, square, broadcast(-5.3919714e-2f));
  y = fma(y, square, broadcast(1.3332969e-1f));
  y = fma(y, square, broadcast(-3.3333325e-1f));
  Float small = fma(mul(x, square), y, x);
  Float e = exp_negative(mul(size, broadcast(-2)));
  Float large = div(sub(broadcast(1), e), add(broadcast(1), e));
  large = where_less(x, zero(), sub(zero(), large), large);
  return where_less(size, broadcast(0.7f), small, large);
}

}  // namespace llmkern::LLMKERN_ISA
