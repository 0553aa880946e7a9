// New keys and values of a cache on the CPU: rotated, quantised and written; compiled once per instruction set.
#include <cmath>
#include <cstring>

#include "../common/parallel.h"
#include "../common/rotation.h"
#include "../common/simd.h"
#include "../common/tile.h"
#include "mask.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr float kSmallest = 1.17549435e-38f;  // a scale below has no inverse

// A row as 8 bits, symmetric, of the dtype T; returns its scale.
template <class T>
float quantize_row(int8_t* to, const T* from, int64_t width) {
  float largest = 0;
  for (int64_t d = 0; d < width; d++) {
    float x = std::fabs(load_one(from + d));
    largest = x > largest || x != x ? x : largest;
    if (x != x) break;
  }
  float scale = largest / 127;
  scale = scale < kSmallest ? 1 : std::isfinite(scale) ? scale : __builtin_nanf("");
  for (int64_t d = 0; d < width; d++) {
    float x = std::nearbyint(load_one(from + d) / scale);
    to[d] = static_cast<int8_t>(x != x ? 0 : x < -127 ? -127 : x > 127 ? 127 : x);
  }
  return scale;
}

// The tokens [begin, end) of (sequence, new token or query), which share a row of the angles.
template <class T>
void append(const CacheParams& p, int64_t steps, int64_t begin, int64_t end) {
  bool rotates = p.rotation.cos != nullptr;
  int64_t angles = rotates ? round_up(p.rotation.rotated, 16) : 0;
  auto* cos = static_cast<float*>(scratch(Scratch::work, static_cast<size_t>(8 * angles + 4 * p.width + 64)));
  float* sin = cos + angles;
  T* turned = reinterpret_cast<T*>(sin + angles);
  for (int64_t i = begin; i < end; i++) {
    int64_t b = i / steps, step = i % steps;
    int64_t token = integer(p.lengths.data, p.lengths.is_64, b * p.lengths.step) + step;
    auto from = [&](const AttentionTensor& t, int64_t h, int64_t row) {
      return reinterpret_cast<T*>(t.data) + b * t.b + h * t.h + row * t.row;
    };
    if (rotates) widen_angles<T>(p.rotation, token, cos, sin);
    if (step < p.added) {
      int64_t page = b, row = token;
      if (p.pages.table) {
        page = integer(p.pages.table, p.pages.is_64, b * p.pages.step + token / p.pages.size);
        row = token % p.pages.size;
      }
      auto write = [&](const T* x, const AttentionTensor& cache, float* scales, const int64_t* steps_of_scales,
                       int64_t h, int64_t width) {
        int64_t at = page * cache.b + h * cache.h + row * cache.row;
        if (scales)
          scales[page * steps_of_scales[0] + h * steps_of_scales[1] + row * steps_of_scales[2]] =
              quantize_row(reinterpret_cast<int8_t*>(cache.data) + at, x, width);
        else
          std::memcpy(reinterpret_cast<T*>(cache.data) + at, x, static_cast<size_t>(width) * sizeof(T));
      };
      for (int64_t h = 0; h < p.kv_heads; h++) {
        const T* key = from(p.key, h, step);
        if (rotates) {
          rotate_row(p.rotation, key, turned, cos, sin, p.width);
          key = turned;
        }
        write(key, p.key_cache, p.key_scales, p.key_scale_steps, h, p.width);
        write(from(p.value, h, step), p.value_cache, p.value_scales, p.value_scale_steps, h, p.value_width);
      }
    }
    if (!rotates || step >= (p.ordered ? p.queries : 1)) continue;
    for (int64_t query = step; query < (p.ordered ? step + 1 : p.queries); query++)
      for (int64_t h = 0; h < p.heads; h++)
        rotate_row(p.rotation, from(p.query, h, query), from(p.rotated, h, query), cos, sin, p.width);
  }
}

}  // namespace

void cache_append(const CacheParams& p) {
  int64_t of_queries = !p.rotation.cos ? 0 : p.ordered ? p.queries : 1;
  int64_t steps = at_least(p.added, of_queries), rows = p.batch * steps;
  if (!rows) return;
  auto body = [&](int thread, int threads) {
    Range work = share(rows, 1, thread, threads);
    switch (p.dtype) {
      case DType::bf16:
        return append<Bf16>(p, steps, work.begin, work.end);
      case DType::f16:
        return append<Fp16>(p, steps, work.begin, work.end);
      default:
        return append<float>(p, steps, work.begin, work.end);
    }
  };
  parallel(rows * (p.heads + p.kv_heads) * (p.width + p.value_width) < 65536 ? 1 : p.threads, body);
}

}  // namespace llmkern::LLMKERN_ISA
