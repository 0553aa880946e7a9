// Gated activations (SwiGLU, GeGLU, ReGLU) for the CPU; compiled once per instruction set.
#include "../common/exp.h"
#include "../common/parallel.h"
#include "../common/row.h"
#include "params.h"

namespace llmkern::LLMKERN_ISA {
namespace {

struct Activated {
  Float value, slope;
};

// The logistic function s, 0 where it is below every normal number, and its slope s (1 - s), which keeps its digits
// where s is near 1.
struct Logistic {
  Float value, slope;
};
LLMKERN_INLINE Logistic logistic(Float x) {
  Float e = exp_negative(sub(zero(), abs(x)));
  Float large = div(broadcast(1.0f), add(broadcast(1.0f), e));
  Float small = where_less(x, broadcast(-87.3f), zero(), mul(e, large));
  return {where_less(x, zero(), small, large), mul(small, large)};
}

// f(x) and f'(x); where only one is used, the compiler leaves the other out.
template <Gate kFunction>
LLMKERN_INLINE Activated activated(Float x) {
  const Float one = broadcast(1.0f);
  if constexpr (kFunction == Gate::relu) {
    return {where_less(x, zero(), zero(), x), where_less(zero(), x, one, mul(x, zero()))};  // NaN stays NaN
  } else if constexpr (kFunction == Gate::silu) {
    Logistic s = logistic(x);
    return {mul(x, s.value), fma(x, s.slope, s.value)};
  } else if constexpr (kFunction == Gate::gelu) {
    Float below = normal_below(x);
    Float density = mul(broadcast(0.398942280f), exp_negative(mul(mul(x, x), broadcast(-0.5f))));
    return {mul(x, below), fma(x, density, below)};
  } else {  // (1 + tanh y) / 2 is the sigmoid of 2 y, with 2 y = inner
    Float square = mul(x, x);
    Float inner = mul(mul(broadcast(1.59576912f), x), fma(broadcast(0.044715f), square, one));
    Logistic s = logistic(inner);
    Float slope = mul(broadcast(1.59576912f), fma(broadcast(0.134145f), square, one));
    return {mul(x, s.value), fma(mul(x, s.slope), slope, s.value)};
  }
}

template <class T, Gate kFunction>
void forward(const GatedParams& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++) {
    const T* gate = static_cast<const T*>(p.gate) + i * p.gate_stride;
    const T* up = static_cast<const T*>(p.up) + i * p.up_stride;
    T* out = static_cast<T*>(p.out) + i * p.width;
    for_each_vector(p.width, [&](int64_t d, int n) {
      store_some(out + d, mul(activated<kFunction>(load_some(gate + d, n)).value, load_some(up + d, n)), n);
    });
  }
}

template <class T, Gate kFunction>
void backward(const GatedBackwardParams& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++) {
    const T* grad = static_cast<const T*>(p.grad) + i * p.grad_stride;
    const T* gate = static_cast<const T*>(p.gate) + i * p.gate_stride;
    const T* up = static_cast<const T*>(p.up) + i * p.up_stride;
    T* dgate = static_cast<T*>(p.dgate) + i * p.dgate_stride;
    T* dup = static_cast<T*>(p.dup) + i * p.dup_stride;
    for_each_vector(p.width, [&](int64_t d, int n) {
      Float g = load_some(grad + d, n);
      Activated a = activated<kFunction>(load_some(gate + d, n));
      store_some(dgate + d, mul(mul(g, load_some(up + d, n)), a.slope), n);
      store_some(dup + d, mul(g, a.value), n);
    });
  }
}

#define LLMKERN_RUN(direction, function) \
  case Gate::function:                   \
    return direction<decltype(type), Gate::function>(p, rows.begin, rows.end);
#define LLMKERN_FOR_EACH_GATE(direction) \
  LLMKERN_RUN(direction, relu)           \
  LLMKERN_RUN(direction, gelu)           \
  LLMKERN_RUN(direction, gelu_tanh)      \
  LLMKERN_RUN(direction, silu)

template <class Params, class Rows>
LLMKERN_INLINE void over_rows(const Params& p, Rows run) {
  auto body = [&](int thread, int threads) {
    const Range rows = share(p.rows, 1, thread, threads);
    if (p.dtype == DType::bf16) return run(Bf16{}, rows);
    if (p.dtype == DType::f16) return run(Fp16{}, rows);
    run(float{}, rows);
  };
  parallel(p.rows * p.width < 16384 ? 1 : p.threads, body);
}

}  // namespace

void gated(const GatedParams& p) {
  over_rows(p, [&](auto type, const Range& rows) {
    switch (p.function) { LLMKERN_FOR_EACH_GATE(forward) }
  });
}

void gated_backward(const GatedBackwardParams& p) {
  over_rows(p, [&](auto type, const Range& rows) {
    switch (p.function) { LLMKERN_FOR_EACH_GATE(backward) }
  });
}

}  // namespace llmkern::LLMKERN_ISA
