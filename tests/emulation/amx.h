// The intrinsics of AMX that csrc uses, executed on any x86-64 processor. Written from the operation given for each in
// Intel's Architecture Instruction Set Extensions, chapter 3; elements are plain C++.
// tests/emulation/amx_check.cpp compares them with the hardware on a processor that has it.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated {

struct TileConfiguration {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};
struct Tiles {
  TileConfiguration configuration;  // all zero: none
  uint8_t tile[8][16][64];
};
static inline Tiles& tiles() {
  static thread_local Tiles t;
  return t;
}
// As the processor does (#UD): an instruction without a configuration, or beyond its shapes, ends the program.
static inline void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "AMX emulation: %s\n", what);
  std::abort();
}
static inline void configured(int tile) {
  const TileConfiguration& c = tiles().configuration;
  require(c.palette == 1, "an instruction without a configuration");
  require(tile >= 0 && tile < 8 && c.rows[tile] && c.bytes[tile], "a tile without rows or bytes");
}

static inline void tile_loadconfig(const void* p) {
  Tiles& t = tiles();
  std::memcpy(&t.configuration, p, sizeof t.configuration);
  for (int i = 0; i < 8; i++)
    require(t.configuration.rows[i] <= 16 && t.configuration.bytes[i] <= 64, "a tile beyond 16 rows of 64 bytes");
  std::memset(t.tile, 0, sizeof t.tile);
}
static inline void tile_release() { std::memset(&tiles(), 0, sizeof(Tiles)); }
static inline void tile_zero(int tile) {
  configured(tile);
  std::memset(tiles().tile[tile], 0, sizeof tiles().tile[tile]);
}
static inline void tile_loadd(int tile, const void* p, int64_t stride) {
  configured(tile);
  Tiles& t = tiles();
  std::memset(t.tile[tile], 0, sizeof t.tile[tile]);
  for (int row = 0; row < t.configuration.rows[tile]; row++)
    std::memcpy(t.tile[tile][row], static_cast<const char*>(p) + row * stride, t.configuration.bytes[tile]);
}
static inline void tile_stored(int tile, void* p, int64_t stride) {
  configured(tile);
  Tiles& t = tiles();
  for (int row = 0; row < t.configuration.rows[tile]; row++)
    std::memcpy(static_cast<char*>(p) + row * stride, t.tile[tile][row], t.configuration.bytes[tile]);
}
// sums (M x N) += a (M x 4 K bytes) * b (K x N, four values of k in each element). First: the type of a's bytes.
template <class First>
static inline void tile_multiply(int sums, int a, int b) {
  configured(sums), configured(a), configured(b);
  Tiles& t = tiles();
  const TileConfiguration& c = t.configuration;
  require(sums != a && sums != b && a != b, "a tile that is two operands");
  require(c.rows[sums] == c.rows[a] && c.bytes[a] == 4 * c.rows[b] && c.bytes[sums] == c.bytes[b],
          "shapes that differ");
  for (int m = 0; m < c.rows[sums]; m++)
    for (int n = 0; n < c.bytes[sums] / 4; n++) {
      uint32_t sum;
      std::memcpy(&sum, t.tile[sums][m] + 4 * n, 4);
      for (int k = 0; k < c.rows[b]; k++)
        for (int i = 0; i < 4; i++)
          sum += static_cast<uint32_t>(static_cast<int32_t>(static_cast<First>(t.tile[a][m][4 * k + i])) *
                                       static_cast<int32_t>(static_cast<int8_t>(t.tile[b][k][4 * n + i])));
      std::memcpy(t.tile[sums][m] + 4 * n, &sum, 4);
    }
  // Rows beyond the shape become zero.
  std::memset(t.tile[sums][c.rows[sums]], 0, static_cast<size_t>(16 - c.rows[sums]) * 64);
}

}  // namespace emulated

#define _tile_loadconfig(p) emulated::tile_loadconfig(p)
#define _tile_release() emulated::tile_release()
#define _tile_zero(tile) emulated::tile_zero(tile)
#define _tile_loadd(tile, p, stride) emulated::tile_loadd(tile, p, stride)
#define _tile_stream_loadd(tile, p, stride) emulated::tile_loadd(tile, p, stride)
#define _tile_stored(tile, p, stride) emulated::tile_stored(tile, p, stride)
#define _tile_dpbusd(sums, a, b) emulated::tile_multiply<uint8_t>(sums, a, b)
#define _tile_dpbssd(sums, a, b) emulated::tile_multiply<int8_t>(sums, a, b)
