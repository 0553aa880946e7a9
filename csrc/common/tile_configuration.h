// The shape of AMX's tile registers, as the processor reads it.
#pragma once
#include <cstdint>

#include "isa.h"

namespace llmkern::LLMKERN_ISA {

struct alignas(64) TileConfiguration {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};
// Eight tiles of 16 rows of 64 bytes. A constant: g++'s _tile_loadconfig tells the compiler of its first 8 bytes alone,
// so that writes to the rest of a variable could be left out before it.
constexpr TileConfiguration kFullTiles = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

}  // namespace llmkern::LLMKERN_ISA
