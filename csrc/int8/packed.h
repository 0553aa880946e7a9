// Packed weights: a header, the sums of each output's weights (one for each group of k), and panels of kPanel outputs.
// A panel holds, for each step of kDotDepth values of k, the weights of its outputs one after another, so that a step
// of a tile reads one run of memory. With AMX the two halves of a panel follow one another, each in the tiles that its
// registers take: 16 steps of a vector of outputs, then of the next. Of pairs, a vector of first ones is followed by
// the one of their seconds. What lies beyond the last output or the last k is zero.
#pragma once
#include <cstring>

#include "../common/parallel.h"
#include "dot.h"
#include "params.h"

namespace llmkern::LLMKERN_ISA {

#if defined(__AMX_INT8__) || defined(LLMKERN_EMULATE_AMX)
#define LLMKERN_TILES
#endif

constexpr int kVectors = kRegisters >= 32 ? 4 : 2;  // of a panel
constexpr int kPanel = kVectors * kWidth;
constexpr int64_t kDepthGrain =
    64;  // depth is filled up to a multiple, so that a row of digits is whole tiles and vectors

struct Header {
  int64_t layout, outputs, depth, group, pairs;
};

struct Layout {
  int64_t outputs, depth, group, panels, groups, steps, panel_bytes, sums_bytes;
  bool pairs;
  Layout(int64_t n, int64_t k, int64_t group_size, bool in_pairs)
      : outputs(n),
        depth(k),
        group(group_size ? group_size
              : k        ? k
                         : 1),
        panels(in_pairs ? (n / 2 + kPanel / 2 - 1) / (kPanel / 2) : (n + kPanel - 1) / kPanel),
        groups(group_size ? (k + group - 1) / group : 1),
        steps((k + kDepthGrain - 1) / kDepthGrain * kDepthGrain / kDotDepth),
        panel_bytes(steps * kDotDepth * kPanel),
        sums_bytes((panels * groups * kPanel * 4 + 63) / 64 * 64),
        pairs(in_pairs) {}
  static constexpr int64_t kHeaderBytes = 64;
  int64_t weights() const { return kHeaderBytes + sums_bytes; }
  int64_t bytes() const { return weights() + panels * panel_bytes; }
#ifdef LLMKERN_TILES
  static constexpr int kTileSteps = 16, kTileBytes = 1024;  // of a tile
  static constexpr int64_t kForm = 0x1a90000;
  // Where a step, and a vector, of a panel begin: the sum is where a vector of a step does.
  static int64_t at_step(int64_t step) { return (step / kTileSteps * 2 * kTileSteps + step % kTileSteps) * 64; }
  int64_t at_vector(int vector) const { return vector / 2 * (panel_bytes / 2) + vector % 2 * kTileBytes; }
#else
  static constexpr int64_t kForm = 0x1a80000;
  static constexpr int64_t at_step(int64_t step) { return step * kPanel * kDotDepth; }
  static constexpr int64_t at_vector(int vector) { return vector * kWidth * kDotDepth; }
#endif
  Header header() const { return {kForm + kPanel * 16 + kDotDepth, outputs, depth, group, pairs}; }
  // The first output of a vector of a panel, and how many of its columns are outputs.
  int64_t first_output(int64_t panel, int vector) const {
    if (!pairs) return panel * kPanel + vector * kWidth;
    return panel * (kPanel / 2) + vector / 2 * kWidth + (vector % 2 ? outputs / 2 : 0);
  }
  int outputs_in(int64_t panel, int vector) const {
    int64_t left = (pairs && vector % 2 == 0 ? outputs / 2 : outputs) - first_output(panel, vector);
    return left < 0 ? 0 : left < kWidth ? static_cast<int>(left) : kWidth;
  }
};

LLMKERN_INLINE void pack_panel(const Int8PackParams& p, const Layout& layout, int64_t panel) {
  char* base = static_cast<char*>(p.packed);
  int8_t* to = reinterpret_cast<int8_t*>(base + layout.weights() + panel * layout.panel_bytes);
  int32_t* sums = reinterpret_cast<int32_t*>(base + Layout::kHeaderBytes) + panel * layout.groups * kPanel;
  for (int column = 0; column < kPanel; column++) {
    int vector = column / kWidth, lane = column % kWidth;
    bool is_output = lane < layout.outputs_in(panel, vector);
    const int8_t* from = p.weight + (is_output ? layout.first_output(panel, vector) + lane : 0) * p.depth;
    int64_t inside = is_output ? p.depth : 0;
    for (int64_t g = 0; g < layout.groups; g++) {
      int64_t begin = g * layout.group, end = begin + layout.group < inside ? begin + layout.group : inside;
      int32_t sum = 0;
      for (int64_t k = begin; k < end; k++) sum += from[k];
      sums[g * kPanel + column] = sum;
    }
    int8_t* out = to + layout.at_vector(vector) + lane * kDotDepth;
    for (int64_t step = 0; step < layout.steps; step++)
      for (int i = 0; i < kDotDepth; i++) {
        int64_t k = step * kDotDepth + i;
        out[layout.at_step(step) + i] = k < inside ? from[k] : int8_t{0};
      }
  }
}

}  // namespace llmkern::LLMKERN_ISA
