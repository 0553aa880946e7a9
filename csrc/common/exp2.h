// 2^x for x <= 0, for softmax: a polynomial on [-1/2, 1/2] and the exponent by integer addition.
#pragma once
#include "simd.h"

namespace llmkern::LLMKERN_ISA {

constexpr float kLog2E = 1.44269504088896341f;

// Exactly 0 at -infinity and below -127, 1 at 0, NaN at NaN; relative error below 2^-23 above -126, where
// kQuick is false, and below 2^-13 where it is true (enough for what is rounded to bf16 next).
template <bool kQuick = false>
LLMKERN_INLINE Float exp2_negative(Float x) {
  const Float magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
  x = max(broadcast(-127.0f), x);              // the second operand where it is NaN
  Float t = add(x, magic);
  Float f = sub(x, sub(t, magic));
  Float y;
  if constexpr (kQuick) {
    y = fma(broadcast(5.500892383e-02f), f, broadcast(2.422109595e-01f));
    y = fma(y, f, broadcast(6.932829283e-01f));
  } else {
    y = fma(broadcast(1.534580806e-4f), f, broadcast(1.339993090e-3f));
    y = fma(y, f, broadcast(9.618489072e-3f));
    y = fma(y, f, broadcast(5.550328642e-2f));
    y = fma(y, f, broadcast(2.402264625e-1f));
    y = fma(y, f, broadcast(6.931471825e-1f));
  }
  y = fma(y, f, broadcast(1.0f));  // exactly 1 at -127, so that the bits come to exactly 0
  return as_float(add(as_int(y), shift_left<23>(as_int(t))));
}

}  // namespace llmkern::LLMKERN_ISA
