// The work of the int8 tiles for Hopper: sizes, what lies in shared memory, and which results a block makes.
#pragma once
#include "../common/sm90_int8.cuh"
#include "cuda_finish.cuh"

namespace llmkern::int8::sm90 {

using namespace device;

constexpr int kConsumers = 2, kRows = 64, kBlockRows = kConsumers * kRows;  // kRows: of a consumer
constexpr int kBlockThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kConsumerWarps = kConsumers * kWarpgroup / 32, kWarpRows = kRows / 4;
// Warps of the producer that bring what TMA cannot: high digits, and scales of groups.
constexpr int kHelperWarps = 2, kHelpers = kHelperWarps * 32;
// What a thread has after the roles are taken; together all that a multiprocessor has, 65536, but for 1024.
constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
constexpr int kDepth = kSpan, kStep = 32;  // values of k: of a tile, of an instruction
// Numbered barriers: of the consumers; of all warps but the one that starts the copies.
enum { kBoth = 1, kBits = 2 };
constexpr int64_t kMostSharedBytes = 227 * 1024;

// kUnit: a group's sums are looked at for their end behind so many values of k, of which groups are multiples.
template <Digits kDigits_, int kColumns_, int kUnit_ = kDepth>
struct Tile {
  static constexpr Digits kDigits = kDigits_;
  static constexpr bool kTwo = kDigits == Digits::two, kGroups = kDigits == Digits::groups;
  static constexpr int kColumns = kColumns_, kHalf = kColumns / 2, kUnit = kUnit_, kUnits = kDepth / kUnit;
  static constexpr int kSums = kColumns / 2;  // of a thread

  // A stage: rows of 128 bytes, swizzled, of the low digits, the weight and the high digits; then the scales of the
  // groups that end in it, those of rows before those of columns.
  static constexpr int kLow = 0, kWeight = kBlockRows * kSpan, kHigh = kWeight + kColumns * kSpan;
  static constexpr int kScales = kHigh + (kTwo ? kBlockRows * kSpan : 0), kScaleCount = kBlockRows + kColumns;
  static constexpr int kStageBytes = kScales + (kGroups ? kUnits * kScaleCount * 4 : 0);
  static constexpr int kStages = 226 * 1024 / kStageBytes;

  struct Control {
    uint64_t full[kStages], empty[kStages];
    uint32_t any_bits[kTwo ? kMostWords : 1];  // for each piece of k whether a row of the block has high digits
  };
  static constexpr int kControl = kStages * kStageBytes, kShared = kControl + static_cast<int>(sizeof(Control));

  // The sums on their way from wgmma's layout to rows, in place of the stages: a warp's rows, each kPitch words, which
  // puts four rows and their pairs of sums into different banks; high sums behind low ones; scales and zero points.
  static constexpr int kPitch = kColumns + 8, kHighCells = kWarpRows * kPitch;
  static constexpr int kRowScales = kHighCells * (kTwo ? 2 : 1), kCells = kRowScales + 2 * kWarpRows;

  static_assert(kStageBytes % kAtom == 0 && kPitch % 32 == 8 && kShared <= kMostSharedBytes);
  static_assert(kConsumerWarps * kCells * 4 <= kControl);
};

// Which blocks there are: a raster of tiles of rows and of columns.
struct Raster {
  int row_tiles, column_tiles;
};

// This block's first row, and the first outputs of the two halves of its columns; of pairs, firsts and seconds.
struct Block {
  int row, first, second;
  int most;  // outputs from here on are none, of the first half

  // Blocks that run at once take kTall tiles of rows by as many of columns as there are then, so that both operands
  // come from the second-level cache.
  LLMKERN_DEVICE Block(const Int8CudaParams& p, const Raster& raster, int columns) {
    constexpr int kTall = 16;
    const int id = static_cast<int>(blockIdx.x), band = id / (kTall * raster.column_tiles);
    const int inside = id - band * kTall * raster.column_tiles;
    const int tall = min(raster.row_tiles - band * kTall, kTall), column = inside / tall;
    const int outputs = static_cast<int>(p.linear.outputs);
    row = (band * kTall + inside - column * tall) * kBlockRows;
    first = column * (p.pairs ? columns / 2 : columns);
    most = p.pairs ? outputs / 2 : outputs;
    second = p.pairs ? first + outputs / 2 : first + columns / 2;
  }
};

// A place in the ring of stages. parity: of the phase of `full` that is awaited there; `empty` has the other one.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  LLMKERN_DEVICE void next() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// Whether the unit of `unit` values of k that ends before k = end is the last of its group.
LLMKERN_DEVICE bool ends_group(const Int8CudaParams& p, int end, int unit) {
  const int depth = static_cast<int>(p.linear.depth);
  return end - unit < depth && (end >= depth || end % static_cast<int>(p.linear.quantize.group) == 0);
}

}  // namespace llmkern::int8::sm90
