// The gradients of attention for the CPU: of query, key, value and of the scores; compiled once per instruction set.
// docs/attention.md describes the algorithm.
#include "probabilities.h"

namespace llmkern::LLMKERN_ISA {
namespace {

// What one thread works in: a block of keys, a strip of queries, and their scores.
template <class T>
struct Work {
  explicit Work(const Sizes<T>& sizes, int64_t more = 0)
      : memory{static_cast<float*>(
            scratch(Scratch::work, static_cast<size_t>(4 * (units(sizes) + more + kBlockKeys * 8))))},
        block(sizes, memory.take(sizes.block_units())),
        query(memory, sizes.depth, sizes.width),
        grad_output(memory, sizes.value_depth, sizes.value_width) {
    weights = memory.take(kStrip * kBlockKeys);
    grad_scores = memory.take(kStrip * kBlockKeys);
    packed = memory.take(3 * kStrip / 2 * kBlockKeys);
    slopes = memory.take(kStrip * kBlockKeys);
    kept = memory.take(kStrip * kBlockKeys);
    key_sums = memory.take(kBlockKeys * sizes.width);
    value_sums = memory.take(kBlockKeys * sizes.value_width);
    average = memory.take(sizes.value_width);
    panels = memory.take(2 * kPanel * sizes.value_depth);
  }
  static int64_t units(const Sizes<T>& sizes) {
    return sizes.block_units() + 2 * sizes.strip_units() + (kBlockKeys + 2) * (sizes.width + sizes.value_width) +
           2 * kPanel * sizes.value_depth + 64;
  }
  Memory memory;
  Block<T> block;
  Rows<T> query, grad_output;
  float *weights, *grad_scores;
  float *slopes, *kept;  // the derivative of the soft cap; weights after dropout
  float* packed;         // bf16: weights and gradients in pairs of rows, gradients in pairs along the row
  float *key_sums, *value_sums;
  float* average;
  float* panels;  // of rows of the output and of its gradient
};

template <class T>
struct Backward {
  const AttentionParams& p;
  Sizes<T> sizes;
  bool of_weights;  // the gradient of the weights is given, not that of the output
  float* delta;     // (B, H, Sq): the sum of weights * their gradient
  float* centres;   // (B, Hkv, width): see find_centre

  int64_t group() const { return p.heads / p.kv_heads; }

  // The weights of a strip in a block, and the gradient of them: the number of keys that the strip sees.
  int gradient_of_weights(const HeadMask& mask, const Block<T>& block, Work<T>& work, const Sequence& s, int64_t h,
                          int64_t row, int count, int64_t begin) const {
    int keys = static_cast<int>(at_most(kBlockKeys, mask.limit(row + count - 1) - begin));
    if (keys <= 0 || !sees_some(mask, row, count, begin, begin + keys)) return 0;
    work.query.pack(queries_of<T>(p.query, s, h) + row * p.query.row, p.query.row, count, p.width);
    probabilities(p, sizes, mask, block, work.query, p.logsumexp + s.row(p, h), row, count, begin, keys, work.weights,
                  work.slopes);
    if (of_weights) {
      const T* from = queries_of<T>(p.weights, s, h) + row * p.weights.row + begin;
      for (int i = 0; i < count; i++, from += p.weights.row) {
        float* to = work.grad_scores + i * kBlockKeys;
        int c = 0;
        for (; c + kWidth <= keys; c += kWidth) store(to + c, load(from + c));
        if (c < keys) store(to + c, load_first(from + c, keys - c));
      }
    } else {
      work.grad_output.pack(queries_of<T>(p.grad_output, s, h) + row * p.grad_output.row, p.grad_output.row, count,
                            p.value_width);
      times_panels<kPairs<T>>(count, work.grad_output.along, work.grad_output.step, block.values, sizes.value_depth,
                              keys, work.grad_scores, kBlockKeys, 1);
      if (drops(mask)) drop(mask, work, row, count, begin, keys);
    }
    return keys;
  }

  // Whether some row of the strip may see a key of [begin, end).
  static bool sees_some(const HeadMask& mask, int64_t row, int count, int64_t begin, int64_t end) {
    if (!mask.dense()) return mask.start(row) < end;
    for (int i = 0; i < count; i++)
      if (mask.look(row + i, begin, end) != Seen::none) return true;
    return false;
  }

  bool drops(const HeadMask& mask) const { return mask.drops() && !of_weights; }

  // The weights as they met the values, apart, and the gradient of those that were not dropped.
  void drop(const HeadMask& mask, Work<T>& work, int64_t row, int count, int64_t begin, int keys) const {
    Float scale = broadcast(p.keep_scale);
    for (int i = 0; i < count; i++) {
      float* kept = work.kept + i * kBlockKeys;
      mask.kept(kept, row + i, begin, keys);
      for (int c = 0; c < keys; c += kWidth) {
        Float factor = mul(load(kept + c), scale);
        float* grad = work.grad_scores + i * kBlockKeys + c;
        store(grad, mul(load(grad), factor));
        store(kept + c, mul(load(work.weights + i * kBlockKeys + c), factor));
      }
    }
  }

  // Whether delta comes from the output and its gradient, which is quick. From the weights themselves it has the
  // rounding of the gradients that it is subtracted from: so where the gradient of the scores is asked for, and where
  // few queries leave an error nothing to hide in, for little more work.
  bool delta_from_output(const Sequence& s) const { return !of_weights && !p.grad_scores && s.queries > kStrip; }

  // Whether delta need not be known beforehand: all that it sums is at hand, and without the rounding of the output.
  bool sees_one_block(const HeadMask& mask, int64_t row) const { return mask.limit(row) <= kBlockKeys; }
  bool sees_one_block(const Sequence& s, int64_t h) const { return sees_one_block(HeadMask(p, s, h), s.queries - 1); }

  // The sum of weights times gradients over a row; a masked key has no part, whatever its value is.
  static float dot(const float* weights, const float* grads, int keys) {
    Float s = zero(), none = zero();
    for (int c = 0; c < keys; c += kWidth) {
      Float w = load(weights + c);
      s = where_equal(w, none, s, fma(w, load(grads + c), s));
    }
    return sum(s);
  }

  // A row's gradients of weights become those of scores: weight * change(gradient).
  template <class Change>
  static void through_softmax(const float* weights, float* grads, int keys, Change change) {
    Float none = zero();
    for (int c = 0; c < keys; c += kWidth) {
      Float w = load(weights + c);
      // A masked key has no part, whatever its value is.
      store(grads + c, where_equal(w, none, none, mul(w, change(load(grads + c)))));
    }
  }

  // Adds what a strip and a block give to the sums of the keys and values (null: not wanted) and of the queries.
  void step(const HeadMask& mask, const Block<T>& block, Work<T>& work, const Sequence& s, int64_t h, int64_t row,
            int64_t begin, float* key_sums, float* value_sums, float* query_sums) const {
    int count = static_cast<int>(at_most(kStrip, s.queries - row));
    int keys = gradient_of_weights(mask, block, work, s, h, row, count, begin);
    if (!keys) return;
    float *weights = work.weights, *grads = work.grad_scores;
    bool whole_rows = sees_one_block(mask, row + count - 1);
    const float* of_rows = delta + s.row(p, h) + row;
    float* row_sums = query_sums && p.row_sums ? p.row_sums + s.row(p, h) + row : nullptr;
    const double* more = p.grad_logsumexp ? p.grad_logsumexp + s.row(p, h) + row : nullptr;
    for (int i = 0; i < count; i++) {
      float *w = weights + i * kBlockKeys, *grad = grads + i * kBlockKeys;
      float of_block = whole_rows || row_sums ? dot(w, grad, keys) : 0, of_row = whole_rows ? of_block : of_rows[i];
      // Not delta, which may come from the output: a sink's gradient sums them over all rows, and that is rounded.
      if (row_sums) row_sums[i] += of_block;
      // The log-sum-exp's part comes last: it may be small beside two that cancel.
      if (more)
        through_softmax(w, grad, keys, [d = broadcast(of_row), m = broadcast(static_cast<float>(more[i]))](Float g) {
          return add(sub(g, d), m);
        });
      else
        through_softmax(w, grad, keys, [d = broadcast(of_row)](Float g) { return sub(g, d); });
    }
    // The gradients of the scores are written once, on the way to the keys.
    if (p.grad_scores && key_sums)
      for (int i = 0; i < count; i++)
        std::memcpy(p.grad_scores + (s.row(p, h) + row + i) * s.keys + begin, grads + i * kBlockKeys,
                    4 * static_cast<size_t>(keys));
    if (mask.caps())
      for (int i = 0; i < count * kBlockKeys; i += kWidth)
        store(grads + i, mul(load(grads + i), load(work.slopes + i)));
    if (drops(mask)) weights = work.kept;
    const float *weights_by_row = weights, *grads_by_row = grads, *grads_along = grads;
    int64_t along_step = kBlockKeys;
    int rows = count, columns = keys;
    if constexpr (kPairs<T>) {
      float* to = work.packed;
      rows = (count + 1) / 2, columns = (keys + 1) / 2, along_step = kBlockKeys / 2;
      weights_by_row = to, grads_by_row = to + kStrip / 2 * kBlockKeys, grads_along = to + kStrip * kBlockKeys;
      for (int i = 0; i < count; i++)
        for (int c = 0; c < keys; c += kWidth)
          store_flushed(reinterpret_cast<Bf16*>(to + kStrip * kBlockKeys + i * along_step) + c,
                        load(grads + i * kBlockKeys + c));
      if (int64_t end = round_up(keys, kWidth); end % (2 * kWidth))  // zeros up to a whole vector of pairs
        for (int i = 0; i < count; i++)
          store_flushed(reinterpret_cast<Bf16*>(to + kStrip * kBlockKeys + i * along_step) + end, zero());
      for (int i = 0; i < rows; i++)
        for (int c = 0; c < keys; c += kWidth) {
          const float *w = weights + 2 * i * kBlockKeys + c, *g = grads + 2 * i * kBlockKeys + c;
          bool both = 2 * i + 1 < count;
          store_pairs(to + i * kBlockKeys + c, load(w), both ? load(w + kBlockKeys) : zero());
          store_pairs(to + (kStrip / 2 + i) * kBlockKeys + c, load(g), both ? load(g + kBlockKeys) : zero());
        }
    }
    constexpr bool kPair = kPairs<T>;
    Span all_rows{0, rows}, all_columns{0, columns};
    if (value_sums)
      times_rows<kPair>(keys, weights_by_row, 1, kBlockKeys, work.grad_output.rows, sizes.value_width,
                        sizes.value_width, &all_rows, 1, value_sums, work.grad_output.special);
    if (key_sums)
      times_rows<kPair>(keys, grads_by_row, 1, kBlockKeys, work.query.rows, sizes.width, sizes.width, &all_rows, 1,
                        key_sums, work.query.special);
    if (!query_sums) return;
    times_rows<kPair>(count, grads_along, along_step, 1, block.key_rows, sizes.width, sizes.width, &all_columns, 1,
                      query_sums, *block.special != 0);
    if (centred(s) && !whole_rows)
      for (int i = 0; i < count; i++) {
        Float excess = zero();
        for (int c = 0; c < columns; c += kWidth) {
          Float g = load(grads_along + i * along_step + c);
          if constexpr (kPair)
            excess = dot_bf16(excess, as_int(g), broadcast_int(kPairOfOnes));
          else
            excess = add(excess, g);
        }
        Float by = broadcast(-sum(excess));
        const float* centre = centre_of(s, h / group());
        float* to = query_sums + i * sizes.width;
        for (int64_t d = 0; d < sizes.width; d += kWidth) store(to + d, fma(by, load(centre + d), load(to + d)));
      }
  }

  // The gradients of a row's scores add up to 0, so that a query's gradient is the sum over keys less any vector alike.
  // With delta from a rounded output they do not quite: what is left over is multiplied by the average key, which may
  // be large, and is taken off again. A soft cap, a sink and the gradient of the log-sum-exp give other sums than 0.
  bool centred(const Sequence& s) const {
    return delta_from_output(s) && p.softcap == 0 && !p.sink && !p.grad_logsumexp;
  }
  static constexpr int32_t kPairOfOnes = 0x3f803f80;

  float* centre_of(const Sequence& s, int64_t kv_head) const {
    return centres + (s.b * p.kv_heads + kv_head) * sizes.width;
  }

  // The average of keys of (s, kv_head) that some queries see, where all are finite; else zeros.
  void find_centre(const Sequence& s, int64_t kv_head) const {
    if (!centred(s)) return;
    float* centre = centre_of(s, kv_head);
    HeadMask mask(p, s, kv_head * group());
    int64_t found = 0;
    std::memset(centre, 0, static_cast<size_t>(4 * sizes.width));
    // Of the first, the middle and the last query: what nobody sees has no part.
    for (int i = 0; i < 3; i++) {
      int64_t row = (s.queries - 1) * i / 2;
      for (int64_t k = mask.start(row); k < mask.limit(row); k++) {
        if (mask.look(row, k, k + 1) == Seen::none) continue;
        found++;
        const T* from = keys_of<T>(p.key, s, kv_head) + k * p.key.row;
        for (int64_t d = 0; d < p.width; d += kWidth) {
          bool whole = d + kWidth <= p.width;
          Float x = whole ? load(from + d) : load_first(from + d, static_cast<int>(p.width - d));
          store(centre + d, add(load(centre + d), x));
        }
      }
    }
    Float by = broadcast(found ? 1 / static_cast<float>(found) : 0), finite = zero();
    for (int64_t d = 0; d < sizes.width; d += kWidth) {
      Float x = mul(load(centre + d), by);
      store(centre + d, x), finite = fma(x, zero(), finite);
    }
    if (sum(finite) != 0) std::memset(centre, 0, static_cast<size_t>(4 * sizes.width));
  }

  // The gradients of one block of keys and values; with query_sums, zeroed and (group, Sq, width), those of the
  // queries are added up too.
  void keys_and_values(const Block<T>& block, Work<T>& work, const Sequence& s, int64_t kv_head, int64_t index,
                       float* query_sums) const {
    int64_t begin = index * kBlockKeys, keys = at_most(kBlockKeys, s.keys - begin);
    std::memset(work.key_sums, 0, static_cast<size_t>(4 * kBlockKeys * sizes.width));
    float* value_sums = of_weights ? nullptr : work.value_sums;
    if (value_sums) std::memset(value_sums, 0, static_cast<size_t>(4 * kBlockKeys * sizes.value_width));
    for (int64_t g = 0; g < group(); g++) {
      int64_t h = kv_head * group() + g;
      HeadMask mask(p, s, h);
      int64_t limit = at_most(s.queries, mask.row_limit(begin + keys - 1));
      for (int64_t row = mask.first_row(begin) / kStrip * kStrip; row < limit; row += kStrip)
        step(mask, block, work, s, h, row, begin, work.key_sums, value_sums,
             query_sums ? query_sums + (g * s.queries + row) * sizes.width : nullptr);
    }
    write(keys_of<T>(p.dkey, s, kv_head) + begin * p.dkey.row, p.dkey.row, keys, work.key_sums, sizes.width, p.width,
          p.scale, nullptr);
    if (of_weights) return;
    bool uniform = p.uniform_empty_rows && !p.sink && empty_rows(s, kv_head, work.average);
    write(keys_of<T>(p.dvalue, s, kv_head) + begin * p.dvalue.row, p.dvalue.row, keys, value_sums, sizes.value_width,
          p.value_width, 1, uniform ? work.average : nullptr);
  }

  // What each value gets from the rows without any key, which attend to all alike. False: there are none.
  bool empty_rows(const Sequence& s, int64_t kv_head, float* to) const {
    bool found = false;
    std::memset(to, 0, static_cast<size_t>(4 * sizes.value_width));
    for (int64_t h = kv_head * group(); h < (kv_head + 1) * group(); h++)
      for (int64_t row = 0; row < s.queries; row++) {
        if (p.logsumexp[s.row(p, h) + row] != minus_infinity()) continue;
        found = true;
        const T* from = queries_of<T>(p.grad_output, s, h) + row * p.grad_output.row;
        for (int64_t d = 0; d < p.value_width; d++) to[d] += load_one(from + d) / static_cast<float>(s.keys);
      }
    return found;
  }

  void write(const T* rows, int64_t row, int64_t count, const float* from, int64_t step, int64_t width, float factor,
             const float* plus) const {
    T* to = const_cast<T*>(rows);
    Float f = broadcast(factor);
    for (int64_t i = 0; i < count; i++, to += row, from += step)
      for (int64_t d = 0; d < width; d += kWidth) {
        Float x = mul(load(from + d), f);
        if (plus) x = add(x, load(plus + d));
        if (d + kWidth <= width)
          store(to + d, x);
        else
          store_first(to + d, x, static_cast<int>(width - d));
      }
  }

  // delta of the rows [row, row + total) of (s, h): from the output and its gradient. Summed in the order in which
  // times_panels sums the gradient of a weight, so that the two cancel exactly where a query sees one key alone, and
  // nearly where one key outweighs the others.
  void delta_of_output(Work<T>& work, const Sequence& s, int64_t h, int64_t row, int64_t total) const {
    float *x = work.panels, *y = x + kPanel * sizes.value_depth;
    for (int64_t end = row + total; row < end; row += kPanel) {
      int64_t count = at_most(kPanel, end - row);
      auto pack = [&](float* to, const AttentionTensor& t) {
        pack_panels<kPairs<T>>(to, queries_of<T>(t, s, h) + row * t.row, t.row, count, p.value_width,
                               sizes.value_depth);
      };
      pack(x, p.grad_output), pack(y, p.output);
      alignas(64) float products[kPanel];
      times_each<kPairs<T>>(x, y, sizes.value_depth, products);
      std::memcpy(delta + s.row(p, h) + row, products, 4 * static_cast<size_t>(count));
    }
  }

  // The same from the weights and their gradient; `blocks` are those of this (s, kv head).
  void delta_of_weights(const float* blocks, Work<T>& work, const Sequence& s, int64_t h, int64_t row,
                        int64_t total) const {
    HeadMask mask(p, s, h);
    float* sums = delta + s.row(p, h);
    for (int64_t end = row + total; row < end; row += kStrip) {
      int count = static_cast<int>(at_most(kStrip, end - row));
      for (int i = 0; i < count; i++) sums[row + i] = 0;
      for (int64_t index = 0; index < sizes.blocks; index++) {
        Block<T> block(sizes, const_cast<float*>(blocks) + index * sizes.block_units());
        int keys = gradient_of_weights(mask, block, work, s, h, row, count, index * kBlockKeys);
        for (int i = 0; i < count; i++)
          sums[row + i] += dot(work.weights + i * kBlockKeys, work.grad_scores + i * kBlockKeys, keys);
      }
    }
  }

  void queries(const float* blocks, Work<T>& work, const Sequence& s, int64_t h, int64_t row, int64_t total,
               float* sums) const {
    HeadMask mask(p, s, h);
    std::memset(sums, 0, static_cast<size_t>(4 * total * sizes.width));
    for (int64_t index = 0; index * kBlockKeys < s.keys; index++) {
      Block<T> block(sizes, const_cast<float*>(blocks) + index * sizes.block_units());
      for (int64_t i = 0; i < total; i += kStrip)
        step(mask, block, work, s, h, row + i, index * kBlockKeys, nullptr, nullptr, sums + i * sizes.width);
    }
    write(queries_of<T>(p.dquery, s, h) + row * p.dquery.row, p.dquery.row, total, sums, sizes.width, p.width, p.scale,
          nullptr);
  }
};

constexpr int64_t kRowsOfTask = 16 * kStrip;  // at most

// Every (sequence, kv head) by one thread, its keys packed block by block: each weight is made once.
template <class T>
void by_head(const Backward<T>& backward, int threads) {
  const AttentionParams& p = backward.p;
  const Sizes<T>& sizes = backward.sizes;
  int64_t group = backward.group();
  Counter counter;
  auto body = [&](int, int) {
    int64_t units = group * p.queries * sizes.width;
    Work<T> work(sizes, units);
    float* query_sums = work.memory.take(units);
    for (int64_t i = counter.take(); i < p.batch * p.kv_heads; i = counter.take()) {
      Sequence s(p, i / p.kv_heads);
      int64_t kv_head = i % p.kv_heads;
      std::memset(query_sums, 0, static_cast<size_t>(4 * units));
      backward.find_centre(s, kv_head);
      for (int64_t h = kv_head * group; h < (kv_head + 1) * group; h++)
        if (s.queries && !backward.sees_one_block(s, h)) backward.delta_of_output(work, s, h, 0, s.queries);
      for (int64_t index = 0; index * kBlockKeys < s.keys; index++) {
        work.block.pack(p, sizes, s, kv_head, index);
        backward.keys_and_values(work.block, work, s, kv_head, index, query_sums);
      }
      for (int64_t g = 0; g < group; g++)
        backward.write(queries_of<T>(p.dquery, s, kv_head * group + g), p.dquery.row, s.queries,
                       query_sums + g * s.queries * sizes.width, sizes.width, p.width, p.scale, nullptr);
    }
  };
  parallel(threads, body);
}

// Every block of keys, then every chunk of queries, by whichever thread is free: the weights are made twice, but few
// heads occupy many threads. All sums are formed in the same order as by_head forms them.
template <class T>
void by_block(const Backward<T>& backward, const Pieces& key_blocks, float* blocks, int threads) {
  const AttentionParams& p = backward.p;
  const Sizes<T>& sizes = backward.sizes;
  int64_t each = key_blocks.count();
  int64_t rows = rows_of_task(p, kRowsOfTask, kStrip, threads);
  Pieces chunks(p.query_bounds, p.batch, p.queries, rows);
  Counter counter;
  // function(block, its sequence, kv head, its number in the sequence) for every block of keys.
  auto for_keys = [&](auto function) {
    counter.next = 0;
    auto body = [&](int, int) {
      Work<T> work(sizes);
      for (int64_t i = counter.take(); i < p.kv_heads * each; i = counter.take()) {
        Sequence s(p, key_blocks.sequence(i % each));
        int64_t index = i % each - key_blocks.first(s.b);
        Block<T> block(sizes, blocks + i * sizes.block_units());
        if (index * kBlockKeys < s.keys) function(block, work, s, i / each, index);
      }
    };
    parallel(threads, body);
  };
  auto for_queries = [&](auto function) {
    counter.next = 0;
    auto body = [&](int, int) {
      Work<T> work(sizes, kRowsOfTask * sizes.width);
      float* sums = work.memory.take(kRowsOfTask * sizes.width);
      for (int64_t i = counter.take(); i < chunks.count() * p.heads; i = counter.take()) {
        int64_t chunk = chunks.count() - 1 - i / p.heads, h = i % p.heads;
        Sequence s(p, chunks.sequence(chunk));
        int64_t row = (chunk - chunks.first(s.b)) * rows;
        if (row < s.queries)
          function(blocks + (h / backward.group() * each + key_blocks.first(s.b)) * sizes.block_units(), work, s, h,
                   row, at_most(rows, s.queries - row), sums);
      }
    };
    parallel(threads, body);
  };
  for_keys([&](Block<T>& block, Work<T>&, const Sequence& s, int64_t kv_head, int64_t index) {
    block.pack(p, sizes, s, kv_head, index);
    if (index == 0) backward.find_centre(s, kv_head);
  });
  for_queries(
      [&](const float* of_head, Work<T>& work, const Sequence& s, int64_t h, int64_t row, int64_t count, float*) {
        if (backward.sees_one_block(s, h)) return;
        if (backward.delta_from_output(s))
          backward.delta_of_output(work, s, h, row, count);
        else
          backward.delta_of_weights(of_head, work, s, h, row, count);
      });
  for_keys([&](Block<T>& block, Work<T>& work, const Sequence& s, int64_t kv_head, int64_t index) {
    backward.keys_and_values(block, work, s, kv_head, index, nullptr);
  });
  for_queries([&](const float* of_head, Work<T>& work, const Sequence& s, int64_t h, int64_t row, int64_t count,
                  float* sums) { backward.queries(of_head, work, s, h, row, count, sums); });
}

template <class T>
void run(const AttentionParams& p, bool of_weights) {
  if (p.batch * p.kv_heads == 0) return;
  Sizes<T> sizes(p);
  constexpr int64_t kMostSums = int64_t(1) << 24;  // units of memory that a thread keeps for the sums of its queries
  int64_t heads = p.batch * p.kv_heads;
  int64_t rows = p.heads * (p.query_bounds.data ? p.query_bounds.total : p.batch * p.queries);
  int threads = static_cast<double>(rows) * static_cast<double>(p.keys * p.width) < 32768 ? 1 : p.threads;
  bool quick = true;  // delta is from the output, or not needed
  for (int64_t b = 0; b < (p.query_bounds.data ? p.batch : 1) && p.keys > kBlockKeys; b++)
    quick = quick && Backward<T>{p, sizes, of_weights, nullptr, nullptr}.delta_from_output(Sequence(p, b));
  bool whole_heads = quick && (heads % threads == 0 || heads >= 4 * threads) &&
                     p.heads / p.kv_heads * p.queries * sizes.width <= kMostSums;
  Pieces key_blocks(p.key_bounds, p.batch, p.keys, kBlockKeys);
  int64_t packed = whole_heads ? 0 : p.kv_heads * key_blocks.count() * sizes.block_units();
  Memory memory{
      static_cast<float*>(scratch(Scratch::pack, static_cast<size_t>(4 * (rows + heads * sizes.width + packed + 48))))};
  Backward<T> backward{p, sizes, of_weights, memory.take(rows), memory.take(heads * sizes.width)};
  if (whole_heads)
    by_head(backward, threads);
  else
    by_block(backward, key_blocks, memory.take(packed), threads);
}

void run(const AttentionParams& p, bool of_weights) {
  switch (p.dtype) {
    case DType::bf16:
      return run<Bf16>(p, of_weights);
    case DType::f16:
      return run<Fp16>(p, of_weights);
    default:
      return run<float>(p, of_weights);
  }
}

}  // namespace

void attention_backward(const AttentionParams& p) { run(p, false); }
void attention_weights_backward(const AttentionParams& p) { run(p, true); }

}  // namespace llmkern::LLMKERN_ISA
