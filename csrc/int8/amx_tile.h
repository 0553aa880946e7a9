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

// Calls each(d) for the multiples d of kTileDepth where one of `rows` rows has a high digit in [d, d + kTileDepth).
template <class Each>
LLMKERN_INLINE void where_high(const Work& w, int64_t row, int rows, const Each& each) {
  constexpr int kQuadsOfTile = kTileDepth / kQuad;
  for (int64_t word = 0; word < w.words; word++) {
    uint64_t quads = high_quads_of(w, row, rows, word);
    for (int part = 0; quads; part++, quads >>= kQuadsOfTile)
      if (quads & ((1u << kQuadsOfTile) - 1)) each((word * (64 / kQuadsOfTile) + part) * kTileDepth);
  }
}

// At most 32 rows and two vectors of a panel or, of at most 16 rows, all four.
struct Block {
  int64_t row, panel;
  int rows, first, last;
  bool high;  // there are sums of high digits
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
  int done = 0;  // rows of the block before

  void add(int64_t row, int rows, int64_t begin, int64_t end) {
    const bool whole = rows <= kTileRows, high = !kGrouped && any_high(w, row, rows);
    for (int64_t panel = begin; panel < end; panel++)
      for (int half = 0; half < (whole ? 1 : 2); half++) {
        now->row = row, now->rows = rows, now->panel = panel, now->high = high;
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

  void finish_rows(int rows) {
    const Block& b = *before;
    if (rows > b.rows - done) rows = b.rows - done;
    if (rows <= 0) return;
    const int64_t at = done * b.apart();
    if (kGrouped)
      finish_groups<T>(w, b.row + done, rows, b.columns, before->totals + at);
    else  // the products of high digits have both signs here
      finish<T, 0>(w, b.row + done, rows, b.columns, b.low_sums + at, b.high ? b.high_sums + at : nullptr);
    done += rows;
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
    if (!now->high) return;
    clear_tiles();
    where_high(w, now->row, now->rows, [&](int64_t d) { add_products<true>(d); });
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
        const auto& add_rows = now->columns.vectors == 2 ? add_group<2> : add_group<kVectors>;
        add_rows(w, now->row + row, rows, columns, sums[(g + 1) % 2] + at, now->totals + at);
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
