// Philox4x32-10 for one counter (philox.h has the CPU's, of many at a time, and the source).
#pragma once
#include "device.cuh"

namespace llmkern::device {

// words[j]: word j of the block at the counter (c0, c1, c2, c3).
LLMKERN_DEVICE void philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t* words) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    uint32_t low0 = 0xD2511F53u * c0, low1 = 0xCD9E8D57u * c2;
    uint32_t high0 = multiply_high(0xD2511F53u, c0), high1 = multiply_high(0xCD9E8D57u, c2);
    c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

}  // namespace llmkern::device
