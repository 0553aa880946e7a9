// Arithmetic of sizes, for every instruction set and for CUDA.
#pragma once
#include <cstdint>

#include "isa.h"

namespace llmkern {

LLMKERN_INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
LLMKERN_INLINE int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
LLMKERN_INLINE int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

}  // namespace llmkern
