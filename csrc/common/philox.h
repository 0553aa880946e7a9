// Philox4x32-10, the counter-based generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3",
// section 4.3): the same bits on every backend, from a seed and a place.
#pragma once
#include <cstdint>

#include "isa.h"

namespace llmkern::LLMKERN_ISA {

constexpr int kPhiloxGroups = 16;  // counters worked on together, in loops that the compiler turns into vectors

// words[4 * i + j]: word j of the block at the counter (c0 + i, c1, c2, c3), for i < kPhiloxGroups.
LLMKERN_INLINE void philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t* words) {
  uint32_t a[kPhiloxGroups], b[kPhiloxGroups], c[kPhiloxGroups], d[kPhiloxGroups];
  for (int i = 0; i < kPhiloxGroups; i++) {
    a[i] = c0 + static_cast<uint32_t>(i);
    b[i] = c1, c[i] = c2, d[i] = c3;
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    for (int i = 0; i < kPhiloxGroups; i++) {
      uint64_t product0 = uint64_t{0xD2511F53u} * a[i], product1 = uint64_t{0xCD9E8D57u} * c[i];
      a[i] = static_cast<uint32_t>(product1 >> 32) ^ b[i] ^ k0;
      b[i] = static_cast<uint32_t>(product1);
      c[i] = static_cast<uint32_t>(product0 >> 32) ^ d[i] ^ k1;
      d[i] = static_cast<uint32_t>(product0);
    }
  }
  for (int i = 0; i < kPhiloxGroups; i++) {
    words[4 * i] = a[i], words[4 * i + 1] = b[i], words[4 * i + 2] = c[i], words[4 * i + 3] = d[i];
  }
}

}  // namespace llmkern::LLMKERN_ISA
