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

// Columns of the weight of which all products are made before the next ones are looked at: so little of the weight and
// of its gradient has to be on its way at a time that the second-level cache keeps the packed rows, and of these a
// panel's part, 48 KB, is about what a first-level cache holds. A multiple of every kPanel.
constexpr int64_t kSlice = 192;

// What one visit of a block of the weight makes: the gradients of the chunk `before` from g, that of its logits, and x,
// the logits of the chunk `next`. Either chunk may be null. x: (count, chunk rows); g: (count, g_step).
struct Visit {
  int64_t first, count;  // entries of the vocabulary
  const Chunk* before = nullptr;
  const float* g = nullptr;
  float* partial = nullptr;  // the group's sum of the hidden states' gradient, (chunk rows, step), or null
  bool fresh = false, first_chunk = false;  // there is no such sum yet, and no gradient of the weight and bias
  const Chunk* next = nullptr;
  float* x = nullptr;
  const float* then = nullptr;  // what the visit after this one looks at first: a block of logits, or null
};

template <class T>
struct Head {
  const LinearHead& p;
  int64_t vocabulary, chunk_rows;
  int64_t step = row_units(p.width), g_step = row_units(chunk_rows);

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
  // What is wanted behind the slice at column d: the next slice, of the next block behind the last one.
  Ahead ahead_of(const Visit& v, const float* gradient, int64_t d) const {
    Ahead ahead;
    const bool last = d + kSlice >= p.width;
    const int64_t from = last ? 0 : d + kSlice, columns = at_most(kSlice, p.width - from);
    const int64_t begin = last ? v.first + kVocabularyBlock : v.first;
    const int64_t rows = last ? at_most(kVocabularyBlock, vocabulary - begin) : v.count;
    if (rows <= 0) return ahead;
    if (in_place())
      ahead.add(static_cast<const float*>(p.weight) + begin * p.weight_stride + from, columns, p.weight_stride, rows);
    if (gradient) ahead.add(gradient + begin * p.width + from, columns, p.width, rows);
    if (last && v.then) ahead.add(v.then, rows * chunk_rows, 0, 1);
    int64_t products = v.next ? v.next->rows : 0;
    if (v.before) products += v.before->rows * ((v.partial ? 1 : 0) + (gradient ? 1 : 0));
    ahead.spread(products * v.count * at_most(kSlice, p.width - d) / (8 * kTileRows * kPanel));
    return ahead;
  }

  void visit(const Visit& v, const Weights& w, const LinearHeadGradients& to) const {
    float* gradient = v.before ? to.weight : nullptr;
    for (int64_t d = 0; d < p.width || d == 0; d += kSlice) {
      const int64_t columns = at_most(kSlice, p.width - d);
      Ahead ahead = ahead_of(v, gradient, d);
      if (v.partial) {
        Operands o = {v.g, g_step, w.data + d, w.step, kPanel, v.partial + d, step, !v.fresh};
        product<false>(o, v.before->rows, round_up(columns, kWidth), v.count, ahead);
      }
      if (gradient) {
        float* c = gradient + v.first * p.width + d;
        Operands o = {v.g, g_step, v.before->by_row + d, step, kPanel, c, p.width, !v.first_chunk};
        product<true>(o, v.count, columns, v.before->rows, ahead);
      }
      if (v.next) {
        Operands o = {w.data + d, w.step, v.next->columns + d * kPanel, kPanel, kPanel * p.width, v.x,
                      chunk_rows, d != 0};
        product<true>(o, v.count, round_up(v.next->rows, kWidth), columns, ahead);
      }
    }
    if (v.before && to.bias) add_to_bias(v, to.bias + v.first);
    if (v.next && p.bias) add_bias(v);
  }

  void add_bias(const Visit& v) const {
    const T* bias = static_cast<const T*>(p.bias) + v.first;
    for (int64_t i = 0; i < v.count; i++) {
      const Float b = broadcast(load_one(bias + i));
      float* x = v.x + i * chunk_rows;
      for (int64_t r = 0; r < v.next->rows; r += kWidth) store(x + r, add(load(x + r), b));
    }
  }
  // In steps of kRows, whatever the chunk's rows are: those depend on which other gradients are made.
  void add_to_bias(const Visit& v, float* to) const {
    for (int64_t i = 0; i < v.count; i++)
      for (int64_t begin = 0; begin < v.before->rows; begin += kRows) {
        const int64_t end = at_most(begin + kRows, v.before->rows);
        Float total = zero();
        for (int64_t r = begin; r < end; r += kWidth) total = add(total, load(v.g + i * g_step + r));
        to[i] = v.first_chunk && !begin ? sum(total) : to[i] + sum(total);
      }
  }

  // The gradient of a chunk's hidden states: the sum over the groups' parts, in their order, and `added` (float32) to
  // what is there.
  void finish_hidden(const LinearHeadGradients& to, const float* partial, int64_t groups, const Chunk& c, bool added,
                     int threads) const {
    auto body = [&](int thread, int count) {
      const Range range = share(c.rows, 1, thread, count);
      for (int64_t r = range.begin; r < range.end; r++) {
        const float* from = partial + r * step;
        const int64_t at = (c.first + r) * p.width;
        for_each_vector(p.width, [&](int64_t d, int n) {
          float* wide = static_cast<float*>(to.hidden) + at + d;
          Float total = load(from + d);
          if (added) total = add(load_some(wide, n), total);
          for (int64_t g = 1; g < groups; g++) total = add(total, load(from + g * chunk_rows * step + d));
          if (to.wide)
            store_some(wide, total, n);
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
