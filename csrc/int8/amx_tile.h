// Tiles of 32 rows and a panel in AMX's tile registers: eight of 16 rows of 64 bytes, one instruction multiplying 16
// rows by 64 values of k and 16 outputs. (Intel, Architecture Instruction Set Extensions, chapter 3.) A panel of packed
// weights is such tiles as it is: 16 steps of four values of k, 256 bytes apart.
#pragma once
#include "../common/tile_configuration.h"
#include "tile.h"
#ifdef LLMKERN_EMULATE_AMX  // the tests run this file on any processor, by an emulation of the instructions
#include "../../tests/emulation/amx.h"
#endif

namespace llmkern::LLMKERN_ISA {

#if defined(__AMX_INT8__) || defined(LLMKERN_EMULATE_AMX)
#define LLMKERN_TILES
constexpr int kTileRows = 16, kTileDepth = 64;
constexpr int kBlockRows = 32;

// Gives the calling thread tile registers of full size for as long as it lives.
struct Tiles {
  const bool wanted;
  explicit Tiles(bool are_wanted) : wanted(are_wanted) {
    if (wanted) _tile_loadconfig(&kFullTiles);
  }
  ~Tiles() {
    if (wanted) _tile_release();
  }
};

// Registers 0 to 3: sums, 4 and 5: activations, 6 and 7: weights. They are constants of the instructions.
template <bool kHigh>
LLMKERN_INLINE void add_products_16(const void* x, int64_t stride, const int8_t* weight) {
  _tile_loadd(4, x, stride);
  _tile_loadd(6, weight, kPanel * 4);
  _tile_loadd(7, weight + 64, kPanel * 4);
  if (kHigh) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
  } else {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
  }
  _tile_loadd(6, weight + 128, kPanel * 4);
  _tile_loadd(7, weight + 192, kPanel * 4);
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
  _tile_loadd(6, weight, kPanel * 4);
  _tile_loadd(5, below, stride);
  _tile_loadd(7, weight + 64, kPanel * 4);
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

// The sums of `rows` rows, at most 32, and two vectors of a panel or, of at most 16 rows, all four: int32[32][kPanel].
template <bool kHigh>
LLMKERN_INLINE void tile_sums(const Work& w, int64_t row, int rows, const int8_t* weight, int32_t* out) {
  const char* x = kHigh ? reinterpret_cast<const char*>(w.high) : reinterpret_cast<const char*>(w.low);
  x += row * w.stride;
  const int64_t depth = w.layout->steps * 4, below = kTileRows * w.stride;
  constexpr int64_t kRowBytes = kPanel * 4;
  auto over_depth = [&](const auto& each) {
    if (kHigh) return where_high(w, row, rows, each);
    for (int64_t d = 0; d < depth; d += kTileDepth) each(d);
  };
  clear_tiles();
  if (rows <= kTileRows) {
    over_depth([&](int64_t d) { add_products_16<kHigh>(x + d, w.stride, weight + d * kPanel); });
    _tile_stored(0, out, kRowBytes);
    _tile_stored(1, out + 16, kRowBytes);
    _tile_stored(2, out + 32, kRowBytes);
    _tile_stored(3, out + 48, kRowBytes);
    return;
  }
  over_depth([&](int64_t d) { add_products_32<kHigh>(x + d, x + d + below, w.stride, weight + d * kPanel); });
  _tile_stored(0, out, kRowBytes);
  _tile_stored(1, out + 16, kRowBytes);
  _tile_stored(2, out + 16 * kPanel, kRowBytes);
  _tile_stored(3, out + 16 * kPanel + 16, kRowBytes);
}

// Rows [begin, end) of a panel, by halves of the panel, which the first-level cache holds meanwhile. Rows up to the
// next multiple of 32 are read: the chunk has them, with any contents.
template <class T>
void amx_tiles(const Work& w, int64_t begin, int64_t end, int64_t panel) {
  alignas(64) int32_t low[kBlockRows * kPanel], high[kBlockRows * kPanel];
  for (int half = 0; half < 2; half++) {
    for (int64_t row = begin; row < end; row += kBlockRows) {
      int rows = end - row < kBlockRows ? static_cast<int>(end - row) : kBlockRows;
      const bool whole = rows <= kTileRows;
      if (whole && half) continue;
      const int8_t* weight = w.weights + panel * w.layout->panel_bytes + half * 2 * kWidth * kDotDepth;
      tile_sums<false>(w, row, rows, weight, low);
      bool two = any_high(w, row, rows);
      if (two) tile_sums<true>(w, row, rows, weight, high);
      const int first = 2 * half, last = whole ? kVectors : first + 2;
      finish<T, 0>(w, row, rows, panel, first, last, low, two ? high : nullptr);  // these products have both signs
    }
  }
}

#else
constexpr int kBlockRows = kRows;
struct Tiles {
  explicit Tiles(bool) {}
};
#endif

}  // namespace llmkern::LLMKERN_ISA
