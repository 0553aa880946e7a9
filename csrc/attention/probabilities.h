// What the backward and the weights kernels share: blocks of keys packed as each product wants them, strips of queries,
// and the weights of a strip in a block, made again from the log-sum-exp that the forward kernel left.
#pragma once
#include "../common/parallel.h"
#include "../common/tile.h"
#include "mask.h"

namespace llmkern::LLMKERN_ISA {
namespace {

constexpr int kBlockKeys = 192;  // a multiple of every kPanel and of kTileRows
constexpr int kStrip = 24;       // queries worked on at a time: even, and a multiple of kTileRows

// Sizes of the packed forms, in units of 32 bits.
template <class T>
struct Sizes {
  explicit Sizes(const AttentionParams& p)
      : depth(kPairs<T> ? (p.width + 1) / 2 : p.width),
        value_depth(kPairs<T> ? (p.value_width + 1) / 2 : p.value_width),
        width(round_up(p.width, kWidth)),
        value_width(round_up(p.value_width, kWidth)),
        blocks((p.keys + kBlockKeys - 1) / kBlockKeys),
        strips((p.queries + kStrip - 1) / kStrip) {}
  int64_t depth, value_depth;  // a row along which a product sums
  int64_t width, value_width;  // a row that a product adds up
  int64_t blocks, strips;

  int64_t block_units() const { return kBlockKeys * (depth + value_depth + width) + 16; }
  int64_t strip_units() const { return kStrip * (depth + value_depth + width + value_width + 2 + 5 * kBlockKeys); }
};

// One block of the keys and values of a (sequence, kv head).
template <class T>
struct Block {
  Block(const Sizes<T>& sizes, float* memory) {
    Memory m{memory};
    keys = m.take(kBlockKeys * sizes.depth);
    values = m.take(kBlockKeys * sizes.value_depth);
    key_rows = m.take(kBlockKeys * sizes.width);
    special = m.take(1);
  }
  float *keys, *values;  // panels
  float* key_rows;
  float* special;  // not 0: the keys are not all finite

  void pack(const AttentionParams& p, const Sizes<T>& sizes, const Sequence& s, int64_t h, int64_t block) {
    int64_t begin = block * kBlockKeys, count = at_most(kBlockKeys, s.keys - begin);
    const T* from = keys_of<T>(p.key, s, h) + begin * p.key.row;
    pack_panels<kPairs<T>>(keys, from, p.key.row, count, p.width, sizes.depth);
    *special = pack_rows<kPairs<T>>(key_rows, from, p.key.row, count, p.width, sizes.width);
    if (p.value.data)
      pack_panels<kPairs<T>>(values, keys_of<T>(p.value, s, h) + begin * p.value.row, p.value.row, count, p.value_width,
                             sizes.value_depth);
  }
};

// Rows of a tensor in the forms that a sum along the row and a sum over the rows want; the same memory where these
// are one.
template <class T>
struct Rows {
  Rows(Memory& m, int64_t depth, int64_t width) : depth(depth), width(width) {
    rows = m.take((kStrip + 1) * width);
    along = kPairs<T> ? m.take(kStrip * depth) : rows;
    step = kPairs<T> ? depth : width;
  }
  float *along, *rows;
  int64_t depth, width, step;
  bool special = false;

  void pack(const T* from, int64_t row, int count, int64_t n) {
    special = pack_rows<kPairs<T>>(rows, from, row, count, n, width);
    if constexpr (kPairs<T>)
      for (int i = 0; i < count; i++) pack_row<true>(along + i * depth, from + i * row, n, depth);
  }
};

// The weights of `count` queries from `row` on for the keys [begin, begin + keys), kBlockKeys apart; 0 where masked,
// and up to the next multiple of kWidth. With `slopes`, which a soft cap alone needs: the derivative of the capped
// scores.
template <class T>
void probabilities(const AttentionParams& p, const Sizes<T>& sizes, const HeadMask& mask, const Block<T>& block,
                   const Rows<T>& query, const double* logsumexp, int64_t row, int count, int64_t begin, int keys,
                   float* weights, float* slopes = nullptr) {
  times_panels<kPairs<T>>(count, query.along, query.step, block.keys, sizes.depth, keys, weights, kBlockKeys, p.scale);
  for (int i = 0; i < count; i++) {
    float* s = weights + i * kBlockKeys;
    if (mask.bends()) mask.bend(s, row + i, begin, keys, slopes ? slopes + i * kBlockKeys : nullptr);
    mask.apply(s, row + i, begin, keys);
    // In two floats: with the rounding error of one, every weight of the row would be off alike.
    double total = logsumexp[row + i] == minus_infinity() ? 0 : logsumexp[row + i];
    float high = static_cast<float>(total);
    Float a = broadcast(high), rest = broadcast(static_cast<float>(static_cast<double>(high) - total));
    for (int c = 0; c < keys; c += kWidth) {
      Float w = exp_negative(sub(load(s + c), a));
      store(s + c, fma(w, rest, w));  // e^rest is 1 + rest, this small
    }
  }
}

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
