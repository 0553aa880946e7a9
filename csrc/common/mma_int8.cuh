// Products of bytes with exact 32-bit sums: by matrix instructions of a warp (PTX ISA, "mma.sync.m16n8k32") and by a
// thread's dot products of four (PTX ISA, "dp4a").
#pragma once
#include "mma.cuh"

namespace llmkern::device {

// c += a b: a (16, 32) by rows, of unsigned or signed bytes, b (32, 8) by columns, of signed ones, c (16, 8). Registers
// as load_matrices gives them: those of a are (rows 0 to 7, k 0 to 15), (8 to 15, 0 to 15), (0 to 7, 16 to 31), (8 to
// 15, 16 to 31), those of b k 0 to 15 and 16 to 31. Lane l has of c the columns 2 (l % 4) and 2 (l % 4) + 1, of the
// rows l / 4 (c[0], c[1]) and l / 4 + 8 (c[2], c[3]).
template <bool kSigned>
LLMKERN_DEVICE void multiply_bytes(int32_t* c, const uint32_t* a, uint32_t b0, uint32_t b1) {
  if constexpr (kSigned)
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// sum + four products of the bytes of a, unsigned or signed, and those of b, signed. The mixed form has no intrinsic.
template <bool kSigned>
LLMKERN_DEVICE int32_t dot4(uint32_t a, uint32_t b, int32_t sum) {
  int32_t d;
  if constexpr (kSigned)
    asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(sum));
  else
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(sum));
  return d;
}
template <bool kSigned>
LLMKERN_DEVICE int32_t dot16(uint4 a, uint4 b, int32_t sum) {
  sum = dot4<kSigned>(a.x, b.x, sum);
  sum = dot4<kSigned>(a.y, b.y, sum);
  sum = dot4<kSigned>(a.z, b.z, sum);
  return dot4<kSigned>(a.w, b.w, sum);
}

}  // namespace llmkern::device
