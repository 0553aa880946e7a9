// Rotary position embedding for the CPU; compiled once per instruction set.
//
// The tables of a block of positions are widened once, with the sign of sin applied, and serve every head of q and k.
#include "../common/parallel.h"
#include "../common/simd.h"
#include "params.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int64_t kBlock = 16;  // positions: 16 KB of tables at a head size of 128

int64_t position(const RotaryParams& p, int64_t b, int64_t s) {
  if (!p.positions) return s;
  int64_t at = b * p.position_stride_b + s * p.position_stride_s;
  if (p.position_dtype == DType::i32) return static_cast<const int32_t*>(p.positions)[at];
  return static_cast<const int64_t*>(p.positions)[at];
}

// Row of the tables as floats: cos and sin, `rotated / 2` each; where interleaved, every cosine twice and every sine as
// (-sin, sin), `rotated` each, so that row * cos + swap_pairs(row) * sin is the rotation.
template <class C>
void widen_tables(const RotaryParams& p, int64_t row, float* cos, float* sin) {
  int64_t half = p.rotated / 2;
  if (row < 0 || row >= p.table_length) {
    for (int64_t j = 0; j < (p.interleaved ? p.rotated : half); j++) cos[j] = sin[j] = __builtin_nanf("");
    return;
  }
  const C* c = static_cast<const C*>(p.cos) + row * p.cos_stride;
  const C* s = static_cast<const C*>(p.sin) + row * p.sin_stride;
  Float sign = broadcast(p.inverse ? -1.0f : 1.0f);
  alignas(64) float cos_part[kWidth], sin_part[kWidth];
  for (int64_t j = 0; j < half; j += kWidth) {
    int n = half - j < kWidth ? static_cast<int>(half - j) : kWidth;
    Float cosines = load_first(c + j, n), sines = mul(load_first(s + j, n), sign);
    if (!p.interleaved) {
      store_first(cos + j, cosines, n);
      store_first(sin + j, sines, n);
      continue;
    }
    store(cos_part, cosines);
    store(sin_part, sines);
    for (int i = 0; i < n; i++) {
      cos[2 * (j + i)] = cos[2 * (j + i) + 1] = cos_part[i];
      sin[2 * (j + i)] = -sin_part[i];
      sin[2 * (j + i) + 1] = sin_part[i];
    }
  }
}

template <class T>
LLMKERN_INLINE void rotate_halves(const T* x, T* out, const float* cos, const float* sin, int64_t half) {
  int64_t j = 0;
  for (; j + kWidth <= half; j += kWidth) {
    Float a = load(x + j), b = load(x + half + j), c = load(cos + j), s = load(sin + j);
    store(out + j, sub(mul(a, c), mul(b, s)));
    store(out + half + j, fma(a, s, mul(b, c)));
  }
  if (j == half) return;
  int n = static_cast<int>(half - j);
  Float a = load_first(x + j, n), b = load_first(x + half + j, n), c = load_first(cos + j, n);
  Float s = load_first(sin + j, n);
  store_first(out + j, sub(mul(a, c), mul(b, s)), n);
  store_first(out + half + j, fma(a, s, mul(b, c)), n);
}

template <class T>
LLMKERN_INLINE void rotate_pairs(const T* x, T* out, const float* cos, const float* sin, int64_t rotated) {
  int64_t j = 0;
  for (; j + kWidth <= rotated; j += kWidth) {
    Float a = load(x + j);
    store(out + j, fma(swap_pairs(a), load(sin + j), mul(a, load(cos + j))));
  }
  if (j == rotated) return;
  int n = static_cast<int>(rotated - j);
  Float a = load_first(x + j, n);
  store_first(out + j, fma(swap_pairs(a), load_first(sin + j, n), mul(a, load_first(cos + j, n))), n);
}

template <class T>
void rotate_block(const RotaryParams& p, const void* in, void* result, const int64_t* stride, const int64_t* out_stride,
                  int64_t heads, int64_t b, int64_t begin, int64_t end, const float* cos, const float* sin,
                  int64_t table_width) {
  for (int64_t h = 0; h < heads; h++) {
    for (int64_t s = begin; s < end; s++) {
      const T* x = static_cast<const T*>(in) + b * stride[0] + h * stride[1] + s * stride[2];
      T* out = static_cast<T*>(result) + b * out_stride[0] + h * out_stride[1] + s * out_stride[2];
      const float *c = cos + (s - begin) * table_width, *n = sin + (s - begin) * table_width;
      if (p.interleaved)
        rotate_pairs(x, out, c, n, p.rotated);
      else
        rotate_halves(x, out, c, n, p.rotated / 2);
      if (out != x && p.rotated < p.width)
        std::memcpy(out + p.rotated, x + p.rotated, static_cast<size_t>(p.width - p.rotated) * sizeof(T));
    }
  }
}

template <class T>
void rotate(const RotaryParams& p, int64_t begin, int64_t end) {
  int64_t blocks = (p.length + kBlock - 1) / kBlock, table_width = p.interleaved ? p.rotated : p.rotated / 2;
  float* cos =
      static_cast<float*>(scratch(Scratch::work, static_cast<size_t>(2 * kBlock * table_width + 1) * sizeof(float)));
  float* sin = cos + kBlock * table_width;
  for (int64_t i = begin; i < end; i++) {
    int64_t b = i / blocks, first = i % blocks * kBlock;
    int64_t last = first + kBlock < p.length ? first + kBlock : p.length;
    for (int64_t s = first; s < last; s++) {
      float *c = cos + (s - first) * table_width, *n = sin + (s - first) * table_width;
      if (p.table_dtype == DType::f32)
        widen_tables<float>(p, position(p, b, s), c, n);
      else
        widen_tables<T>(p, position(p, b, s), c, n);
    }
    rotate_block<T>(p, p.q, p.q_out, p.q_stride, p.q_out_stride, p.heads, b, first, last, cos, sin, table_width);
    if (p.k)
      rotate_block<T>(p, p.k, p.k_out, p.k_stride, p.k_out_stride, p.kv_heads, b, first, last, cos, sin, table_width);
  }
}

}  // namespace

void rotary(const RotaryParams& p) {
  auto body = [&](int thread, int threads) {
    Range work = share(p.batch * ((p.length + kBlock - 1) / kBlock), 1, thread, threads);
    switch (p.dtype) {
      case DType::bf16:
        return rotate<Bf16>(p, work.begin, work.end);
      case DType::f16:
        return rotate<Fp16>(p, work.begin, work.end);
      default:
        return rotate<float>(p, work.begin, work.end);
    }
  };
  parallel(p.batch * (p.heads + p.kv_heads) * p.length * p.width < 32768 ? 1 : p.threads, body);
}

}  // namespace llmkern::LLMKERN_ISA
