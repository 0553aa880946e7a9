// Rotary position embedding for the CPU; compiled once per instruction set.
//
// The tables of a block of positions are widened once, with the sign of sin applied, and serve every head of q and k.
#include "../common/parallel.h"
#include "../common/rotation.h"
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

template <class T>
void rotate_block(const RotaryParams& p, const RotationTables& tables, const void* in, void* result,
                  const int64_t* stride, const int64_t* out_stride, int64_t heads, int64_t b, int64_t begin,
                  int64_t end, const float* cos, const float* sin, int64_t table_width) {
  for (int64_t h = 0; h < heads; h++) {
    for (int64_t s = begin; s < end; s++) {
      const T* x = static_cast<const T*>(in) + b * stride[0] + h * stride[1] + s * stride[2];
      T* out = static_cast<T*>(result) + b * out_stride[0] + h * out_stride[1] + s * out_stride[2];
      const float *c = cos + (s - begin) * table_width, *n = sin + (s - begin) * table_width;
      rotate_row(tables, x, out, c, n, p.width);
    }
  }
}

template <class T>
void rotate(const RotaryParams& p, int64_t begin, int64_t end) {
  int64_t blocks = (p.length + kBlock - 1) / kBlock, table_width = p.interleaved ? p.rotated : p.rotated / 2;
  float* cos =
      static_cast<float*>(scratch(Scratch::work, static_cast<size_t>(2 * kBlock * table_width + 1) * sizeof(float)));
  float* sin = cos + kBlock * table_width;
  RotationTables tables{p.cos,        p.sin,        p.table_dtype, p.table_length, p.rotated,
                        p.cos_stride, p.sin_stride, p.interleaved, p.inverse};
  for (int64_t i = begin; i < end; i++) {
    int64_t b = i / blocks, first = i % blocks * kBlock;
    int64_t last = first + kBlock < p.length ? first + kBlock : p.length;
    for (int64_t s = first; s < last; s++) {
      float *c = cos + (s - first) * table_width, *n = sin + (s - first) * table_width;
      widen_angles<T>(tables, position(p, b, s), c, n);
    }
    rotate_block<T>(p, tables, p.q, p.q_out, p.q_stride, p.q_out_stride, p.heads, b, first, last, cos, sin,
                    table_width);
    if (p.k)
      rotate_block<T>(p, tables, p.k, p.k_out, p.k_stride, p.k_out_stride, p.kv_heads, b, first, last, cos, sin,
                      table_width);
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
