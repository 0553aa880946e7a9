// Prints what AMX's instructions make of fixed bytes, for shapes of every size. Equal output shows that the emulation
// does what the processor does.
#ifdef LLMKERN_EMULATE_AMX
#include "amx.h"
#else
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#endif

namespace {

uint8_t next_byte() {  // xorshift, Marsaglia 2003
  static uint32_t x = 2463534242u;
  x ^= x << 13, x ^= x >> 17, x ^= x << 5;
  return x % 5 == 0 ? 0x80 : x % 5 == 1 ? 0x7f : x % 5 == 2 ? 0xff : static_cast<uint8_t>(x >> 8);
}

}  // namespace

int main() {
#ifndef LLMKERN_EMULATE_AMX
  if (syscall(SYS_arch_prctl, 0x1023, 18)) return 1;
#endif
  static uint8_t a[16 * 80], b[16 * 80], sums[16 * 80], high[16 * 80];
  for (int m = 1; m <= 16; m += 3)
    for (int n = 1; n <= 16; n += 5)
      for (int k = 1; k <= 16; k += 3) {
        struct alignas(64) {
          uint8_t palette = 1, start_row = 0, reserved[14] = {};
          uint16_t bytes[16] = {};
          uint8_t rows[16] = {};
        } c;
        c.rows[0] = c.rows[1] = static_cast<uint8_t>(m), c.bytes[0] = c.bytes[1] = static_cast<uint16_t>(4 * n);
        c.rows[2] = static_cast<uint8_t>(m), c.bytes[2] = static_cast<uint16_t>(4 * k);
        c.rows[3] = static_cast<uint8_t>(k), c.bytes[3] = static_cast<uint16_t>(4 * n);
        for (uint8_t& x : a) x = next_byte();
        for (uint8_t& x : b) x = next_byte();
        for (uint8_t& x : sums) x = next_byte();
        std::memset(high, 0, sizeof high);
        asm volatile("" : : "r"(&c) : "memory");  // the intrinsic tells the compiler of its first bytes alone
        _tile_loadconfig(&c);
        _tile_loadd(0, sums, 80);
        _tile_zero(1);
        _tile_loadd(2, a, 80);
        _tile_loadd(3, b, 80);
        _tile_dpbusd(0, 2, 3);
        _tile_dpbssd(1, 2, 3);
        _tile_stored(0, sums, 80);
        _tile_stored(1, high, 80);
        _tile_release();
        std::printf("%d %d %d:", m, n, k);
        for (uint8_t x : sums) std::printf("%02x", x);
        for (uint8_t x : high) std::printf("%02x", x);
        std::printf("\n");
      }
}
