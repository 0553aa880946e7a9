// Tiles of 16 keys for cuda_decode.cu: read from the cache straight into the registers that mma.sync takes.
//
// A matrix product does not care in which order its inner dimension is summed, nor in which order columns stand, as
// long as both sides agree. So no element has to be moved between threads: whatever 16 bytes a thread reads are the
// elements that it multiplies. With L elements in 16 bytes, q = lane % 4 and g = lane / 4 (PTX ISA, "Matrix fragments
// for mma.m16n8k16"):
// - keys, the columns of queries keys^T: lane reads elements 4 L c + L q ... + L - 1 of keys g and g + 8. Four of them
//   are one product's: element h of step i is number 4 L (i / (L / 4)) + L q + 4 (i % (L / 4)) + h of the row.
// - values, whose rows are the keys: lane reads elements 8 L c + L g ... + L - 1 of keys 2 q, 2 q + 1, 2 q + 8 and
//   2 q + 9, which are the rows that it has to give. Column g of product i is element 8 L c + L g + i of the row.
#pragma once
#include "../common/mma.cuh"
#include "params.h"

namespace llmkern::decode {

using device::exp2_quick;
using device::log2_quick;

template <class T>
LLMKERN_DEVICE void multiply(float (&c)[4], uint4 a, uint32_t b0, uint32_t b1, T) {
  const uint32_t rows[4] = {a.x, a.y, a.z, a.w};
  device::multiply(c, rows, b0, b1, T{});
}

constexpr int kTile = 16;  // keys
constexpr unsigned kAll = 0xffffffffu;
constexpr float kLog2E = 1.4426950408889634f;

LLMKERN_DEVICE float minus_infinity() { return device::bits_to_float(0xff800000u); }

// By the special function unit, too.
LLMKERN_DEVICE float inverse_quick(float x) {
  float y;
  asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Four signed bytes as two pairs of numbers, exactly, without the slow conversions of integers: put into the mantissa
// of a power of two, which is then subtracted.
LLMKERN_DEVICE void widen_bytes(uint32_t bytes, uint32_t (&pairs)[2], Fp16) {
  uint32_t biased = bytes ^ 0x80808080u;  // 1024 + 128 + x
  pairs[0] = __byte_perm(biased, 0x64646464u, 0x4140), pairs[1] = __byte_perm(biased, 0x64646464u, 0x4342);
#pragma unroll
  for (int i = 0; i < 2; i++) asm("sub.f16x2 %0, %0, %1;" : "+r"(pairs[i]) : "r"(0x64806480u));
}
LLMKERN_DEVICE void widen_bytes(uint32_t bytes, uint32_t (&pairs)[2], Bf16) {
  pairs[0] = __byte_perm(bytes, 0, 0x4140), pairs[1] = __byte_perm(bytes, 0, 0x4342);
#pragma unroll
  for (int i = 0; i < 2; i++) {
    // bfloat16 has seven bits of mantissa: 128 and the lower seven bits, less 128 or, with the eighth, 256.
    uint32_t low = (pairs[i] & 0x007f007fu) | 0x43004300u, less = (pairs[i] & 0x00800080u) | 0xc300c300u;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pairs[i]) : "r"(low), "r"(0x3f803f80u), "r"(less));
  }
}

// `sum` becomes NaN where one of the pair is NaN or infinite.
LLMKERN_DEVICE void look_for_nonfinite(uint32_t& sum, uint32_t pair, Fp16) {
  asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(pair), "r"(0));
}
LLMKERN_DEVICE void look_for_nonfinite(uint32_t& sum, uint32_t pair, Bf16) {
  asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(pair), "r"(0));
}

// 16 bytes of a row from element d on, zeros from `width` on. kAligned: the address is a multiple of 16 bytes, and
// width of the elements in them.
template <bool kAligned, class K>
LLMKERN_DEVICE uint4 read_piece(const K* row, int d, int width) {
  constexpr int L = device::kLanes<K>;
  uint4 x = make_uint4(0, 0, 0, 0);
  if (kAligned) {
    if (d < width) x = __ldg(reinterpret_cast<const uint4*>(row + d));
  } else {
    uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < L; i++) {
      if (d + i >= width) continue;
      uint32_t bits;
      if constexpr (sizeof(K) == 1)
        bits = static_cast<uint8_t>(row[d + i]);
      else
        bits = row[d + i].bits;
      words[i * 4 / L] |= bits << (i % (L / 4) * (128 / L));
    }
    x = make_uint4(words[0], words[1], words[2], words[3]);
  }
  return x;
}

LLMKERN_DEVICE uint32_t word(const uint4& x, int i) { return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w; }

// Where a key lies; row < 0: it is not read.
struct Place {
  int page, row;
};

LLMKERN_DEVICE int64_t integer_at(const char* data, bool is_64, int64_t i) {
  return is_64 ? reinterpret_cast<const int64_t*>(data)[i] : reinterpret_cast<const int32_t*>(data)[i];
}

// A page outside the pool, which nobody on the host has looked for, is read as the nearest one in it.
LLMKERN_DEVICE Place find(const AttentionPages& pages, int64_t b, int key, bool exists) {
  if (!exists) return {0, -1};
  if (!pages.table) return {static_cast<int>(b), key};
  int size = static_cast<int>(pages.size), number = key / size;
  int64_t page = integer_at(pages.table, pages.is_64, b * pages.step + number);
  page = page < 0 ? 0 : page >= pages.count ? pages.count - 1 : page;
  return {static_cast<int>(page), key - number * size};
}

// The row of the key that lane `from` has the place of; null where it is not read.
template <class K>
LLMKERN_DEVICE const K* row_of(const AttentionTensor& t, int64_t h, const Place& place, int from) {
  int page = __shfl_sync(kAll, place.page, from), row = __shfl_sync(kAll, place.row, from);
  return row < 0 ? nullptr : reinterpret_cast<const K*>(t.data) + page * t.b + h * t.h + row * t.row;
}

template <class K, int kWidth>
struct KeyTile {
  static constexpr int L = device::kLanes<K>, kPieces = kWidth / (4 * L), kSteps = kWidth / 16;
  uint4 x[2][kPieces];  // of keys g and g + 8

  template <bool kAligned>
  LLMKERN_DEVICE void read(const AttentionTensor& t, int64_t h, const Place& place, int width, int lane) {
#pragma unroll
    for (int n = 0; n < 2; n++) {
      const K* row = row_of<K>(t, h, place, lane / 4 + 8 * n);
#pragma unroll
      for (int c = 0; c < kPieces; c++)
        x[n][c] = row ? read_piece<kAligned>(row, 4 * L * c + L * (lane % 4), width) : make_uint4(0, 0, 0, 0);
    }
  }
  // scores += queries keys^T, in two halves of eight keys. queries: what fill_queries has written.
  template <class T>
  LLMKERN_DEVICE void multiply_by(const uint4* queries, float (&scores)[2][4], int lane, T) const {
#pragma unroll
    for (int i = 0; i < kSteps; i++) {
      uint4 a = queries[32 * i + lane];
#pragma unroll
      for (int n = 0; n < 2; n++) {
        uint32_t b[2];
        if constexpr (sizeof(K) == 1) {
          widen_bytes(word(x[n][i / 4], i % 4), b, T{});
        } else {
          b[0] = word(x[n][i / 2], i % 2 * 2), b[1] = word(x[n][i / 2], i % 2 * 2 + 1);
        }
        multiply(scores[n], a, b[0], b[1], T{});
      }
    }
  }
};

template <class K, int kWidth>
struct ValueTile {
  static constexpr int L = device::kLanes<K>, kPieces = kWidth / (8 * L);
  uint4 x[4][kPieces];  // of keys 2 q, 2 q + 1, 2 q + 8, 2 q + 9

  static LLMKERN_DEVICE int key(int j, int lane) { return 2 * (lane % 4) + (j & 1) + 8 * (j >> 1); }

  template <bool kAligned>
  LLMKERN_DEVICE void read(const AttentionTensor& t, int64_t h, const Place& place, int width, int lane) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const K* row = row_of<K>(t, h, place, key(j, lane));
#pragma unroll
      for (int c = 0; c < kPieces; c++)
        x[j][c] = row ? read_piece<kAligned>(row, 8 * L * c + L * (lane / 4), width) : make_uint4(0, 0, 0, 0);
    }
  }
  // The L pairs of products' columns that lane gives of keys j and j + 1, in piece c: use(i, pair).
  template <class T, class Use>
  LLMKERN_DEVICE void pairs(int c, int j, T, Use use) const {
#pragma unroll
    for (int w = 0; w < 4; w++) {
      uint32_t a = word(x[j][c], w), b = word(x[j + 1][c], w);
      if constexpr (sizeof(K) == 1) {
        uint32_t low[2], high[2];
        widen_bytes(__byte_perm(a, b, 0x5140), low, T{});
        widen_bytes(__byte_perm(a, b, 0x7362), high, T{});
        use(4 * w, low[0]), use(4 * w + 1, low[1]), use(4 * w + 2, high[0]), use(4 * w + 3, high[1]);
      } else {
        use(2 * w, __byte_perm(a, b, 0x5410)), use(2 * w + 1, __byte_perm(a, b, 0x7632));
      }
    }
  }
  // output += weights values, in L products for each piece.
  template <class T>
  LLMKERN_DEVICE void add_to(float (&output)[kPieces][L][4], uint4 weights, T) const {
#pragma unroll
    for (int c = 0; c < kPieces; c++) {
      uint32_t b[L];
      pairs(c, 0, T{}, [&](int i, uint32_t pair) { b[i] = pair; });
      pairs(c, 2, T{}, [&](int i, uint32_t pair) { multiply(output[c][i], weights, b[i], pair, T{}); });
    }
  }
  template <class T>
  LLMKERN_DEVICE bool finite(T) const {
    uint32_t sum = 0;
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int c = 0; c < kPieces; c++)
#pragma unroll
        for (int w = 0; w < 4; w++) look_for_nonfinite(sum, word(x[j][c], w), T{});
    return sum == 0;
  }
  // sums += product i of piece c, as if the values of keys whose bit is not set were 0. Of 16-bit elements.
  template <class T>
  LLMKERN_DEVICE void add_some(float (&sums)[4], uint4 weights, int c, int i, unsigned keys, int lane, T) const {
    uint32_t y[4];
#pragma unroll
    for (int j = 0; j < 4; j++) y[j] = keys >> key(j, lane) & 1 ? word(x[j][c], i / 2) : 0;
    unsigned order = i % 2 ? 0x7632 : 0x5410;
    multiply(sums, weights, __byte_perm(y[0], y[1], order), __byte_perm(y[2], y[3], order), T{});
  }
};

}  // namespace llmkern::decode
