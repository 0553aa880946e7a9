// Arguments of the microbenchmarks that measure what this processor can do at most, and their Python face.
#pragma once
#include <cstdint>

namespace llmkern {

enum class Roofline : int32_t { fp32 = 0, bf16 = 1, int8 = 2, read = 3 };

// Repeats register-resident multiply-adds, or reads of the block at `data`, on every thread.
struct RooflineParams {
  Roofline kind;
  const float* data;  // for read: a multiple of 512 bytes, shared among the threads
  int64_t bytes;
  int64_t repeats;
  float* sink;   // one float per thread: what was computed, so that it cannot be left out
  double* work;  // the operations done (a multiply-add counts 2), or bytes read, by all threads together
  int threads;
};

}  // namespace llmkern
