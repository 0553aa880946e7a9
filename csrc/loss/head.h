// A linear head over a chunk of rows: its logits block by block of the vocabulary, and its gradients from theirs.
//
// Logits of a block lie transposed, (vocabulary, chunk): rows are lanes, so that statistics of rows and the products
// with the weight as it lies need no packing of the weight, which is read once.
#pragma once
#include "../common/parallel.h"
#include "../common/row.h"
#include "layout.h"
#include "product.h"

namespace llmkern::LLMKERN_ISA {
namespace {

// A chunk of hidden states. Columns: panels of kPanel rows, transposed. by_row: as they are, in float32.
struct Chunk {
  float *columns, *by_row;
  int64_t first, rows;
};

// Rows of the weight in float32.
struct Weights {
  const float* data;
  int64_t step;
};

// How many summed elements of the logits come from one piece of the packed rows, which stays in the first-level cache.
LLMKERN_INLINE int64_t depth_of_piece(int64_t width) {
  int64_t pieces = (width + 143) / 144;
  return round_up((width + pieces - 1) / pieces, 16);
}

template <class T>
struct Head {
  const LinearHead& p;
  int64_t vocabulary, chunk_rows;
  int64_t step = row_units(p.width);

  Chunk place(Memory& memory, bool by_row) const {
    Chunk c = {};
    c.columns = memory.take(column_units(p.width, chunk_rows));
    if (by_row) c.by_row = memory.take(chunk_rows * step);
    return c;
  }
  void pack(Chunk& c, int64_t first, int64_t rows) const {
    c.first = first, c.rows = rows;
    const T* from = static_cast<const T*>(p.hidden) + first * p.hidden_stride;
    pack_panels<false>(c.columns, from, p.hidden_stride, rows, p.width, p.width);
    if (c.by_row) pack_rows<false>(c.by_row, from, p.hidden_stride, rows, p.width, step);
  }

  // Whether vectors are read from the weight where it lies: no row ends within one, and panels of columns do not fall
  // into few sets of the first-level cache.
  bool in_place() const {
    return std::is_same<T, float>::value && p.width % 16 == 0 && p.weight_stride % 16 == 0 &&
           p.weight_stride / 16 % 8 != 0;
  }
  int64_t copy_units() const { return in_place() ? 0 : kVocabularyBlock * step; }
  Weights weights(int64_t first, int64_t count, float* copy) const {
    const T* from = static_cast<const T*>(p.weight) + first * p.weight_stride;
    if constexpr (std::is_same<T, float>::value)
      if (in_place()) return {from, p.weight_stride};
    pack_rows<false>(copy, from, p.weight_stride, count, p.width, step);
    return {copy, step};
  }
  // The memory of the weight's next block, and of its gradient's.
  Ahead next_block(int64_t first, const float* gradient) const {
    const int64_t begin = first + kVocabularyBlock, end = at_most(begin + kVocabularyBlock, vocabulary);
    Ahead ahead = {};
    if (begin >= end) return ahead;
    auto set = [&](const float* from, const char*& low, const char*& high) {
      low = reinterpret_cast<const char*>(from + begin * p.width);
      high = reinterpret_cast<const char*>(from + end * p.width);
    };
    if (gradient) set(gradient, ahead.next, ahead.end);
    if (in_place() && p.weight_stride == p.width) set(static_cast<const float*>(p.weight), ahead.then, ahead.then_end);
    return ahead;
  }

  // x: (count, chunk_rows), the logits of entries [first, first + count) for the rows of the chunk; zeros behind them
  // but for the bias.
  void logits(const Weights& w, const Chunk& c, int64_t first, int64_t count, float* x, Ahead& ahead) const {
    const int64_t piece = depth_of_piece(p.width);
    for (int64_t d = 0; d < p.width || d == 0; d += piece) {
      Operands o = {w.data + d, w.step, c.columns + d * kPanel, kPanel, kPanel * p.width, x, chunk_rows, d != 0};
      product<true>(o, count, round_up(c.rows, kWidth), at_most(piece, p.width - d), ahead);
    }
    if (!p.bias) return;
    const T* bias = static_cast<const T*>(p.bias) + first;
    for (int64_t v = 0; v < count; v++) {
      const Float b = broadcast(load_one(bias + v));
      for (int64_t r = 0; r < c.rows; r += kWidth) store(x + v * chunk_rows + r, add(load(x + v * chunk_rows + r), b));
    }
  }

  // From g, the gradient of the logits laid out as they are: adds to `partial` (chunk_rows, step) where it is not null,
  // and to the gradients of weight and bias. fresh: the partial sums hold nothing yet; first_chunk: nor do those.
  void gradients(const LinearHeadGradients& to, const Weights& w, const Chunk& c, int64_t first, int64_t count,
                 const float* g, float* partial, bool fresh, bool first_chunk, Ahead& ahead) const {
    if (to.bias)
      for (int64_t v = 0; v < count; v++) {
        Float total = zero();
        for (int64_t r = 0; r < c.rows; r += kWidth) total = add(total, load(g + v * chunk_rows + r));
        to.bias[first + v] = first_chunk ? sum(total) : to.bias[first + v] + sum(total);
      }
    if (partial) {
      Operands o = {g, chunk_rows, w.data, w.step, kPanel, partial, step, !fresh};
      product<false>(o, c.rows, round_up(p.width, kWidth), count, ahead);
    }
    if (to.weight) {
      Operands o = {g, chunk_rows, c.by_row, step, kPanel, to.weight + first * p.width, p.width, !first_chunk};
      product<true>(o, count, p.width, c.rows, ahead);
    }
  }

  // The gradient of a chunk's hidden states: the sum over the groups' parts, in their order.
  void finish_hidden(const LinearHeadGradients& to, const float* partial, int64_t groups, const Chunk& c, int threads) {
    auto body = [&](int thread, int count) {
      const Range range = share(c.rows, 1, thread, count);
      for (int64_t r = range.begin; r < range.end; r++) {
        const float* from = partial + r * step;
        const int64_t at = (c.first + r) * p.width;
        for_each_vector(p.width, [&](int64_t d, int n) {
          Float total = load(from + d);
          for (int64_t g = 1; g < groups; g++) total = add(total, load(from + g * chunk_rows * step + d));
          if (to.wide)
            store_some(static_cast<float*>(to.hidden) + at + d, total, n);
          else
            store_some(static_cast<T*>(to.hidden) + at + d, total, n);
        });
      }
    };
    parallel(threads, body);
  }
};

}  // namespace
}  // namespace llmkern::LLMKERN_ISA
