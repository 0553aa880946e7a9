// The work of the Hopper attention kernel: sizes, what lies in shared memory, and which keys a block of queries sees.
#pragma once
#include "../common/sm90.cuh"
#include "params.h"

namespace llmkern {
namespace {

using namespace device;

constexpr int kConsumers = 2, kRows = 64, kBlockRows = kConsumers * kRows;  // kRows: of a consumer
constexpr int kKeys = 128;                                                  // of a tile
constexpr int kStages = 2, kBlockThreads = (1 + kConsumers) * kWarpgroup;
// What a thread has after the roles are taken; together all that a multiprocessor has, 65536, but for 1024.
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
constexpr int kPart = kSpan / 2;  // elements of a row of 128 bytes: heads lie in parts of these
// Numbered barriers: of the consumers together; from kTurn on one for each consumer's turn to multiply, from kOwn on
// one for each consumer's threads.
enum { kBoth = 1, kTurn = 2, kOwn = 4 };

// Places and lengths stay below, so that they fit 32 bits with a window added; a wider window is none.
constexpr int64_t kMost = int64_t{1} << 30;
int64_t row_blocks(const AttentionParams& p) { return (p.queries + kBlockRows - 1) / kBlockRows; }

struct Work {
  const char* lengths;  // null: none
  double* logsumexp;    // null: not asked for
  int64_t lengths_step, lengths_more;
  int32_t heads, group, queries, keys, left, right, row_blocks;  // group: query heads of a key head
  float scale;
  bool lengths_64, bottom_right, uniform_empty_rows;
};

template <int kWidth>
struct alignas(1024) Tiles {
  static constexpr int kParts = kWidth / kPart;
  uint16_t query[kConsumers][kParts][kRows * kPart];  // then the output
  uint16_t key[kStages][kParts][kKeys * kPart];
  uint16_t value[kStages][kParts][kKeys * kPart];
  uint64_t query_full, key_full[kStages], key_empty[kStages], value_full[kStages], value_empty[kStages];
};

LLMKERN_DEVICE int within(int64_t x, int most) { return x < 0 ? 0 : x > most ? most : static_cast<int>(x); }

struct Range {
  int begin, end;
  LLMKERN_DEVICE bool empty() const { return end <= begin; }
};

// Which keys the queries of a block see, and the tiles that hold them, from the last to the first.
struct Block {
  int b, h, row, rows, keys, diagonal;  // row: the first; keys: of this batch
  int first_tile, tiles;
  int seen_begin, seen_end;  // keys that all rows see

  LLMKERN_DEVICE explicit Block(const Work& w) {
    int id = blockIdx.x, rest = id / w.row_blocks;
    // Later rows see more keys where the mask is causal: their blocks begin first.
    row = (w.row_blocks - 1 - (id - rest * w.row_blocks)) * kBlockRows;
    rows = w.queries - row < kBlockRows ? w.queries - row : kBlockRows;
    b = rest / w.heads, h = rest - b * w.heads;
    keys = w.keys;
    if (w.lengths) keys = within(length(w) + w.lengths_more, keys);
    diagonal = w.bottom_right ? keys - w.queries : 0;
    Range first = seen(w, row), last = seen(w, row + rows - 1), all = {first.begin, last.end};
    seen_begin = last.begin, seen_end = first.end;
    // Only the first rows or the last ones can be empty.
    if (w.uniform_empty_rows && (first.empty() || last.empty())) all = {0, w.keys}, seen_begin = w.keys, seen_end = 0;
    first_tile = all.begin / kKeys;
    tiles = all.empty() ? 0 : (all.end + kKeys - 1) / kKeys - first_tile;
  }
  LLMKERN_DEVICE int64_t length(const Work& w) const {
    int64_t at = b * w.lengths_step;
    return w.lengths_64 ? reinterpret_cast<const int64_t*>(w.lengths)[at]
                        : reinterpret_cast<const int32_t*>(w.lengths)[at];
  }
  LLMKERN_DEVICE Range seen(const Work& w, int row) const {
    return {within(row + diagonal - w.left, keys), within(row + diagonal + w.right + 1, keys)};
  }
  LLMKERN_DEVICE int first_key(int t) const { return (first_tile + tiles - 1 - t) * kKeys; }
  LLMKERN_DEVICE bool masked(int t) const { return first_key(t) < seen_begin || first_key(t) + kKeys > seen_end; }
};

}  // namespace
}  // namespace llmkern
