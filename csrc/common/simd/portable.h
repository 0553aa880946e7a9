// Vector operations in plain C++ with the compiler's vector types: 4 floats, any processor.
//
// This header is also the description of the operations, which the headers beside it offer under the
// same names: Float is a register of kWidth floats, Int one of kWidth int32. Loads and stores take any
// alignment. `first` forms touch only the first n elements (0 <= n <= kWidth) in memory.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../isa.h"
#include "../types.h"

namespace llmkern::LLMKERN_ISA {

constexpr int kWidth = 4;
constexpr int kRegisters = 16;    // how many vectors a micro-kernel may hope to keep in registers
constexpr bool kBf16Dot = false;  // whether dot_bf16 is one instruction
typedef float Float __attribute__((vector_size(16)));
typedef int32_t Int __attribute__((vector_size(16)));

LLMKERN_INLINE Float zero() { return Float{}; }
LLMKERN_INLINE Float broadcast(float x) { return Float{x, x, x, x}; }
LLMKERN_INLINE Int broadcast_int(int32_t x) { return Int{x, x, x, x}; }
LLMKERN_INLINE Float add(Float a, Float b) { return a + b; }
LLMKERN_INLINE Float sub(Float a, Float b) { return a - b; }
LLMKERN_INLINE Float mul(Float a, Float b) { return a * b; }
LLMKERN_INLINE Float div(Float a, Float b) { return a / b; }
LLMKERN_INLINE Float fma(Float a, Float b, Float c) { return a * b + c; }  // one rounding where hardware has it
LLMKERN_INLINE Float max(Float a, Float b) { return a > b ? a : b; }       // b where either is NaN
LLMKERN_INLINE Float min(Float a, Float b) { return a < b ? a : b; }       // b where either is NaN

LLMKERN_INLINE Int as_int(Float a) {
  Int b;
  std::memcpy(&b, &a, sizeof b);
  return b;
}
LLMKERN_INLINE Float as_float(Int a) {
  Float b;
  std::memcpy(&b, &a, sizeof b);
  return b;
}
LLMKERN_INLINE Float abs(Float a) { return as_float(as_int(a) & 0x7fffffff); }
LLMKERN_INLINE Float swap_pairs(Float a) { return Float{a[1], a[0], a[3], a[2]}; }  // lanes 2 i and 2 i + 1
LLMKERN_INLINE Int round_to_int(Float a) {  // to nearest, ties to even; INT32_MIN out of range and for NaN
  Int r;
  for (int i = 0; i < kWidth; i++)
    r[i] = std::fabs(a[i]) < 2147483648.0f ? static_cast<int32_t>(std::nearbyintf(a[i])) : INT32_MIN;
  return r;
}
LLMKERN_INLINE Float to_float(Int a) { return __builtin_convertvector(a, Float); }
// Wraps around, as the instructions do: an exponent added to an infinity's bits overflows.
LLMKERN_INLINE Int add(Int a, Int b) {
  typedef uint32_t Unsigned __attribute__((vector_size(16)));
  return reinterpret_cast<Int>(reinterpret_cast<Unsigned>(a) + reinterpret_cast<Unsigned>(b));
}
LLMKERN_INLINE Int sub(Int a, Int b) { return a - b; }
template <int N>
LLMKERN_INLINE Int shift_left(Int a) {
  typedef uint32_t Unsigned __attribute__((vector_size(16)));
  return reinterpret_cast<Int>(reinterpret_cast<Unsigned>(a) << N);
}

LLMKERN_INLINE Int mul(Int a, Int b) { return a * b; }

LLMKERN_INLINE void transpose(Float* rows) {  // rows[kWidth]: lane j of row i becomes lane i of row j
  Float a = rows[0], b = rows[1], c = rows[2], d = rows[3];
  for (int i = 0; i < kWidth; i++) rows[i] = Float{a[i], b[i], c[i], d[i]};
}

LLMKERN_INLINE float sum(Float a) { return (a[0] + a[2]) + (a[1] + a[3]); }
LLMKERN_INLINE float largest(Float a) {
  float x = a[0] > a[2] ? a[0] : a[2], y = a[1] > a[3] ? a[1] : a[3];
  return x > y ? x : y;
}

LLMKERN_INLINE Float first(int n, Float a, Float b) { return (Int{0, 1, 2, 3} < broadcast_int(n)) ? a : b; }
// Lane i of a where mask[i] is not 0, of b elsewhere; reads kWidth bytes.
LLMKERN_INLINE Float keep(const uint8_t* mask, Float a, Float b) {
  Int m = {mask[0], mask[1], mask[2], mask[3]};
  return (m != 0) ? a : b;
}

// Lane i of x where a equals b there, of y elsewhere.
LLMKERN_INLINE Float where_equal(Float a, Float b, Float x, Float y) { return (a == b) ? x : y; }
// The same where a is less than b.
LLMKERN_INLINE Float where_less(Float a, Float b, Float x, Float y) { return (a < b) ? x : y; }

LLMKERN_INLINE Float load(const float* p) {
  Float a;
  std::memcpy(&a, p, sizeof a);
  return a;
}
LLMKERN_INLINE Float load(const int8_t* p) {
  Float r;
  for (int i = 0; i < kWidth; i++) r[i] = p[i];
  return r;
}
LLMKERN_INLINE void store(float* p, Float a) { std::memcpy(p, &a, sizeof a); }
LLMKERN_INLINE Float load_first(const float* p, int n) {
  Float a = zero();
  std::memcpy(&a, p, 4 * static_cast<size_t>(n));
  return a;
}
LLMKERN_INLINE void store_first(float* p, Float a, int n) { std::memcpy(p, &a, 4 * static_cast<size_t>(n)); }

LLMKERN_INLINE float scalar_from_bits(uint32_t x) {
  float f;
  std::memcpy(&f, &x, 4);
  return f;
}
LLMKERN_INLINE uint32_t scalar_bits(float f) {
  uint32_t x;
  std::memcpy(&x, &f, 4);
  return x;
}
LLMKERN_INLINE float widen(Bf16 x) { return scalar_from_bits(static_cast<uint32_t>(x.bits) << 16); }
LLMKERN_INLINE float widen(Fp16 h) {
  uint32_t sign = (h.bits & 0x8000u) << 16, magnitude = h.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return scalar_from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x400u) return scalar_from_bits(sign | ((magnitude << 13) + (112u << 23)));
  float f = static_cast<float>(magnitude) * 0x1p-24f;  // subnormal or zero
  return scalar_from_bits(sign | scalar_bits(f));
}
LLMKERN_INLINE Bf16 narrow(float a, Bf16) {  // to nearest, ties to even; NaN stays NaN
  uint32_t x = scalar_bits(a);
  if (a != a) return {static_cast<uint16_t>((x | 0x400000u) >> 16)};
  return {static_cast<uint16_t>((x + 0x7fffu + ((x >> 16) & 1u)) >> 16)};
}
LLMKERN_INLINE Fp16 narrow(float a, Fp16) {
  uint32_t x = scalar_bits(a), sign = (x >> 16) & 0x8000u;
  x &= 0x7fffffffu;
  if (x > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u | ((x >> 13) & 0x3ffu))};
  if (x >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to infinity
  if (x < 0x38800000u) {                                                 // subnormal: let an addition round
    float shifted = scalar_from_bits(x) + 0.5f;
    return {static_cast<uint16_t>(sign | (scalar_bits(shifted) - 0x3f000000u))};
  }
  return {static_cast<uint16_t>(sign | ((x + 0xfffu + ((x >> 13) & 1u) - (112u << 23)) >> 13))};
}
template <class T>
LLMKERN_INLINE Float load(const T* p) {
  return Float{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
}
template <class T>
LLMKERN_INLINE void store(T* p, Float a) {
  for (int i = 0; i < kWidth; i++) p[i] = narrow(a[i], T{});
}
template <class T>
LLMKERN_INLINE Float load_first(const T* p, int n) {
  Float a = zero();
  for (int i = 0; i < n; i++) a[i] = widen(p[i]);
  return a;
}
template <class T>
LLMKERN_INLINE void store_first(T* p, Float a, int n) {
  for (int i = 0; i < n; i++) p[i] = narrow(a[i], T{});
}

// May write subnormal numbers as 0, where that is quicker.
LLMKERN_INLINE void store_flushed(Bf16* p, Float a) { store(p, a); }
LLMKERN_INLINE void store_flushed(Bf16* p, Float a, Float b) { store(p, a), store(p + kWidth, b); }

// Lane i of both as bf16 in the two halves of p[i], low first; subnormal numbers as in store_flushed.
LLMKERN_INLINE void store_pairs(float* p, Float low, Float high) {
  Bf16 a[kWidth], b[kWidth];
  store(a, low), store(b, high);
  for (int i = 0; i < kWidth; i++) {
    uint32_t pair = a[i].bits | static_cast<uint32_t>(b[i].bits) << 16;
    std::memcpy(p + i, &pair, 4);
  }
}

// acc + lo(a) * lo(b) + hi(a) * hi(b), each lane of a and b holding two bf16 values.
LLMKERN_INLINE Float dot_bf16(Float acc, Int a, Int b) {
  const int32_t high = static_cast<int32_t>(0xffff0000u);
  acc = fma(as_float(shift_left<16>(a)), as_float(shift_left<16>(b)), acc);
  return fma(as_float(a & high), as_float(b & high), acc);
}

}  // namespace llmkern::LLMKERN_ISA
