// e^x for x <= 0, and what is made of it: tanh and the error function. A power of two by integer
// addition, times a polynomial for e^r with |r| <= ln(2) / 2 (Cody and Waite, Software Manual for the Elementary
// Functions, chapter 6).
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
  Float x = max(least, given);     // the second operand where it is NaN
  Float t = fma(x, log2e, magic);  // n in its low bits
  Float n = sub(t, magic), r, y;   // e^x = 2^n e^r
  if constexpr (kQuick) {
    r = fma(n, broadcast(-0.693147181f), x);
    y = fma(broadcast(1.651709825e-1f), r, broadcast(5.041550994e-1f));
    y = fma(y, r, broadcast(1.000198126f));
  } else {
    // ln 2 in two parts, the first so short that its product is exact even where fma rounds twice.
    r = fma(n, broadcast(2.12194440e-4f), fma(n, broadcast(-0.693359375f), x));
    y = fma(broadcast(1.384337200e-3f), r, broadcast(8.374397643e-3f));
    y = fma(y, r, broadcast(4.166801646e-2f));
    y = fma(y, r, broadcast(1.666642874e-1f));
    y = fma(y, r, broadcast(4.999999404e-1f));
    y = fma(y, r, broadcast(1.0f));
  }
  y = fma(y, r, broadcast(1.0f));
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

// The error function of |x| below 1, and what is missing from it to 1 beyond: x P(x^2) and e^(-x^2) Q(1 / (1 + x / 2)),
// both of least maximal error.
struct ErrorFunction {
  Float size, near, missing;
};
LLMKERN_INLINE ErrorFunction error_function(Float x) {
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
  return {size, mul(size, p), mul(exp_negative(sub(zero(), square)), q)};
}
LLMKERN_INLINE Float erf(Float x) {  // odd
  ErrorFunction e = error_function(x);
  Float y = where_less(e.size, broadcast(1.0f), e.near, sub(broadcast(1.0f), e.missing));
  return where_less(x, zero(), sub(zero(), y), y);
}
// The normal distribution function, (1 + erf(x / sqrt(2))) / 2, which keeps its digits where it is small; 0 where it is
// below every normal number.
LLMKERN_INLINE Float normal_below(Float x) {
  ErrorFunction e = error_function(mul(x, broadcast(0.707106781f)));
  Float half = broadcast(0.5f), one = broadcast(1.0f);
  Float tail = where_less(e.size, one, fma(e.near, broadcast(-0.5f), half), mul(half, e.missing));
  tail = where_less(x, broadcast(-13.2f), zero(), tail);
  return where_less(x, zero(), tail, sub(one, tail));
}

}  // namespace llmkern::LLMKERN_ISA
