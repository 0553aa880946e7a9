// Blocks of 32 rows and half a panel in AMX's tile registers: eight of 16 rows of 64 bytes, one instruction multiplying
// 16 rows by 64 values of k and 16 outputs. (Intel, Architecture Instruction Set Extensions, chapter 3.)
//
// 32 rows of activations stay in the first-level cache while panels pass through it, with the hint not to keep them.
// The tile unit works beside the others: they finish a block while it multiplies the next.
#pragma once
#include "../common/tile_configuration.h"
#include "tile.h"
#ifdef LLMKERN_EMULATE_AMX  // the tests run this file on any processor, by an emulation of the instructions
#include "../../tests/emulation/amx.h"
#endif

namespace llmkern::LLMKERN_ISA {

constexpr int kTileRows = 16, kTileDepth = 64;
#ifdef LLMKERN_TILES
constexpr bool kTiled = true;
constexpr int kBlockRows = 2 * kTileRows;

// Gives the calling thread tile registers of full size for as long as it lives.
struct Tiles {
  Tiles() { _tile_loadconfig(&kFullTiles); }
  ~Tiles() { _tile_release(); }
};

// Registers 0 to 3: sums, 4 and 5: activations, 6 and 7: weights. They are constants of the instructions.
template <bool kHigh>
LLMKERN_INLINE void add_products_16(const void* x, int64_t stride, const int8_t* weight, const int8_t* other_half) {
  _tile_loadd(4, x, stride);
  _tile_stream_loadd(6, weight, 64);
  _tile_stream_loadd(7, weight + Layout::kTileBytes, 64);
  if (kHigh) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
  } else {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
  }
  _tile_stream_loadd(6, other_half, 64);
  _tile_stream_loadd(7, other_half + Layout::kTileBytes, 64);
  if (kHigh) {
    _tile_dpbssd(2, 4, 6);
    _tile_dpbssd(3, 4, 7);
  } else {
    _tile_dpbusd(2, 4, 6);
    _tile_dpbusd(3, 4, 7);
  }
}
template <bool kHigh>
LLMKERN_INLINE void add_products_32(const void* x, const void* below, int64_t stride, const int8_t* weight) {
  _tile_loadd(4, x, stride);
  _tile_stream_loadd(6, weight, 64);
  _tile_loadd(5, below, stride);
  _tile_stream_loadd(7, weight + Layout::kTileBytes, 64);
  if (kHigh) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(3, 5, 7);
  } else {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(3, 5, 7);
  }
}
LLMKERN_INLINE void clear_tiles() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}
// The sums as rows of two vectors, or of four.
LLMKERN_INLINE void store_tiles_32(int32_t* out) {
  _tile_stored(0, out, 128);
  _tile_stored(1, out + 16, 128);
  _tile_stored(2, out + 512, 128);
  _tile_stored(3, out + 528, 128);
}
LLMKERN_INLINE void store_tiles_16(int32_t* out) {
  _tile_stored(0, out, 256);
  _tile_stored(1, out + 16, 256);
  _tile_stored(2, out + 32, 256);
  _tile_stored(3, out + 48, 256);
}

// Where the rows of a block have high digits: the quads of k of each row or, where those are many, the tiles that hold
// one, which the tile unit multiplies for all rows.
class HighDigits {
 public:
  void find(const Work& w, int64_t row, int rows) {
    constexpr int kQuadsOfTile = kTileDepth / kQuad;
    quads_ = tiles_ = 0, rows_ = 0;
    if (!w.high) return;
    for (int64_t word = 0; word < w.words; word++) {
      uint64_t any = 0;
      for (int i = 0; i < rows; i++) {
        uint64_t bits = w.bits[(row + i) * w.words + word];
        any |= bits;
        rows_ |= uint32_t{bits != 0} << i;
        const int count = __builtin_popcountll(bits);
        if (quads_ + count <= kMostQuads)  // beyond, they are not multiplied by themselves
          for (int at = quads_; bits; bits &= bits - 1)
            quad_[at++] = {i, static_cast<int32_t>(word * 64) + __builtin_ctzll(bits)};
        quads_ += count;
      }
      for (int part = 0; any; part++, any >>= kQuadsOfTile)
        if (any & ((1u << kQuadsOfTile) - 1)) tile_[tiles_++] = static_cast<int32_t>(word * (64 / kQuadsOfTile) + part);
    }
  }
  uint32_t rows() const { return rows_; }  // bit i: row i has one
  bool by_quads() const { return quads_ <= kMostQuads && quads_ <= kQuadsOfOneTile * tiles_; }

  // out += the products of the quads, with N vectors of a panel from `first`: rows of N vectors.
  template <int N>
  void add_quads(const Work& w, int64_t row, const int8_t* panel, int first, int32_t* out) const {
    const int8_t* weights = panel + w.layout->at_vector(first);
    for (int i = 0; i < quads_; i++) {
      const int8_t* weight = weights + w.layout->at_step(quad_[i].quad * kStepsOfQuad);
      const Int digits = broadcast_step(w.high + (row + quad_[i].row) * w.stride + quad_[i].quad * kQuad);
      int32_t* sums = out + quad_[i].row * N * kWidth;
#pragma GCC unroll 4
      for (int v = 0; v < N; v++, sums += kWidth) {
        const Int changed = high_weights(load_weights(weight + w.layout->at_vector(v)));
        Int sum = dot_high(load_sums(sums), digits, changed);
        std::memcpy(sums, &sum, sizeof sum);
      }
    }
  }
  // Calls each(d) for the multiples d of kTileDepth at which a tile has high digits.
  template <class Each>
  void each_tile(const Each& each) const {
    for (int i = 0; i < tiles_; i++) each(int64_t{tile_[i]} * kTileDepth);
  }

 private:
  static constexpr int kMostQuads = 256, kQuadsOfOneTile = 4;  // that take as long as a tile
  static constexpr int kMostTiles = 1 << 10;                   // compiled.py's bound on k is 65793
  struct Quad {
    int32_t row, quad;
  };
  int quads_, tiles_;
  uint32_t rows_;
  Quad quad_[kMostQuads];
  int32_t tile_[kMostTiles + 8];
};

// At most 32 rows and two vectors of a panel or, of at most 16 rows, all four.
struct Block {
  int64_t row, panel;
  int rows, first, last;
  uint32_t high_rows;  // bit i: row i has high digits
  bool by_quads;       // whose sums are made by dot_high
  static constexpr int kSums = kBlockRows * 2 * kWidth;
  alignas(64) int32_t low_sums[kSums], high_sums[kSums];
  alignas(64) float totals[kSums];  // over the groups of k
  Columns columns;
  int64_t apart() const { return columns.vectors * kWidth; }
};

// Blocks one after another: while one is multiplied, the results of the one before are made.
template <class T, bool kGrouped>
class Blocks {
 public:
  explicit Blocks(const Work& work) : w(work) { before->rows = 0; }

  // each(body) calls body(begin, end, first, last) for rows [begin, end) of panels [first, last). Rows up to the next
  // multiple of 32 are read: the chunk has them, with any contents.
  template <class Each>
  void all(const Each& each) {
    each([&](int64_t begin, int64_t end, int64_t first, int64_t last) {
      for (int64_t row = begin; row < end; row += kBlockRows)
        add(row, end - row < kBlockRows ? static_cast<int>(end - row) : kBlockRows, first, last);
    });
    finish_rows(before->rows);
  }

 private:
  const Work& w;
  Block blocks[2], *now = blocks, *before = blocks + 1;
  HighDigits high;
  int done = 0;  // rows of the block before

  void add(int64_t row, int rows, int64_t begin, int64_t end) {
    const bool whole = rows <= kTileRows;
    if (!kGrouped) high.find(w, row, rows);
    for (int64_t panel = begin; panel < end; panel++)
      for (int half = 0; half < (whole ? 1 : 2); half++) {
        now->row = row, now->rows = rows, now->panel = panel;
        now->high_rows = kGrouped ? 0 : high.rows(), now->by_quads = now->high_rows && high.by_quads();
        now->first = 2 * half, now->last = whole ? kVectors : now->first + 2;
        now->columns = columns_of(w, panel, now->first, now->last);
        if (kGrouped)
          multiply_groups();
        else
          multiply();
        finish_rows(before->rows);
        Block* next = before;
        before = now, now = next, done = 0;
      }
  }

  // Results of the next `rows` rows of the block before.
  void finish_rows(int rows) {
    const Block& b = *before;
    const int end = done + rows < b.rows ? done + rows : b.rows;
    while (done < end) {  // rows that have high digits apart from those that have none
      const bool has_high = b.high_rows >> done & 1;
      const int first = done;
      do done++;
      while (done < end && (b.high_rows >> done & 1) == has_high);
      const int64_t at = first * b.apart();
      const int32_t* high_sums = has_high ? b.high_sums + at : nullptr;
      if (kGrouped)
        finish_groups<T>(w, b.row + first, done - first, b.columns, before->totals + at);
      else if (b.by_quads)
        finish<T, kHighOffset>(w, b.row + first, done - first, b.columns, b.low_sums + at, high_sums);
      else  // the tile unit takes two signed factors
        finish<T, 0>(w, b.row + first, done - first, b.columns, b.low_sums + at, high_sums);
    }
  }

  // Products of the block at k = d.
  template <bool kHigh>
  __attribute__((always_inline)) void add_products(int64_t d) {
    const char* x = kHigh ? reinterpret_cast<const char*>(w.high) : reinterpret_cast<const char*>(w.low);
    x += now->row * w.stride + d;
    const int8_t* weight = w.panel(now->panel) + w.layout->at_vector(now->first) + d * 2 * kWidth;
    if (now->rows > kTileRows)
      add_products_32<kHigh>(x, x + kTileRows * w.stride, w.stride, weight);
    else
      add_products_16<kHigh>(x, w.stride, weight, weight + w.layout->panel_bytes / 2);
  }
  __attribute__((always_inline)) void store_tiles(int32_t* out) {
    if (now->rows > kTileRows)
      store_tiles_32(out);
    else
      store_tiles_16(out);
  }

  // How many of `rows` rows to take for each tile of `depth` values of k.
  static int share(int rows, int64_t depth) {
    const int64_t tiles = depth / kTileDepth;
    return static_cast<int>((rows + tiles - 1) / tiles);
  }

  void multiply() {
    const int64_t depth = w.layout->steps * kDotDepth;
    const int finished = share(before->rows, depth);
    clear_tiles();
    for (int64_t d = 0; d < depth; d += kTileDepth) {
      add_products<false>(d);
      finish_rows(finished);
    }
    store_tiles(now->low_sums);
    if (!now->high_rows) return;
    if (now->by_quads) {
      std::memset(now->high_sums, 0, sizeof now->high_sums);
      const int8_t* panel = w.panel(now->panel);
      if (now->columns.vectors == 2) return high.add_quads<2>(w, now->row, panel, now->first, now->high_sums);
      return high.add_quads<kVectors>(w, now->row, panel, now->first, now->high_sums);
    }
    clear_tiles();
    high.each_tile([&](int64_t d) { add_products<true>(d); });
    store_tiles(now->high_sums);
  }

  // The sums of a group of k are scaled and added to the totals while the next is multiplied.
  void multiply_groups() {
    const Layout& layout = *w.layout;
    const int64_t depth = layout.steps * kDotDepth;
    const int finished = share(before->rows, depth), added = share(now->rows, layout.group);
    std::memset(now->totals, 0, sizeof now->totals);
    int32_t* sums[2] = {now->low_sums, now->high_sums};
    for (int64_t g = 0, d = 0; g <= layout.groups; g++) {
      const int64_t end = d + layout.group < depth ? d + layout.group : depth;
      const GroupColumns columns = columns_of_group(w, now->panel, now->first, now->last, g ? g - 1 : 0);
      int row = g ? 0 : now->rows;
      auto add = [&](int rows) {
        if (rows > now->rows - row) rows = now->rows - row;
        const int64_t at = row * now->apart();
        const int32_t* found = sums[(g + 1) % 2] + at;
        if (now->columns.vectors == 2)
          add_group<2>(w, now->row + row, rows, columns, found, now->totals + at);
        else
          add_group<kVectors>(w, now->row + row, rows, columns, found, now->totals + at);
        row += rows;
      };
      if (g == layout.groups) return add(now->rows);
      clear_tiles();
      for (; d < end; d += kTileDepth) {
        add_products<false>(d);
        finish_rows(finished);
        add(added);
      }
      add(now->rows);
      store_tiles(sums[g % 2]);
    }
  }
};

#else
constexpr bool kTiled = false;
constexpr int kBlockRows = kRows;
#endif

}  // namespace llmkern::LLMKERN_ISA
