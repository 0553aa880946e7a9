// The instructions of sm_80 and newer that a kernel of matrix products is made of: copies into shared memory that run
// beside the arithmetic, matrices from shared memory into registers, and their products (PTX ISA, "cp.async",
// "ldmatrix", "mma.sync.m16n8k16").
//
// A matrix of 16-bit elements lies in shared memory in rows of a multiple of 128 bytes. Its pieces of 16 bytes change
// places within each 128 bytes: `swizzle` takes piece c of row r to c ^ (r % 8), so that neither eight rows of one
// piece (ldmatrix) nor the pieces of one row (copies) meet in a bank.
#pragma once
#include "device.cuh"
#include "special.cuh"

namespace llmkern::device {

LLMKERN_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// The offset in bytes of a piece of 16 bytes in rows of `kRowBytes`.
template <int kRowBytes>
LLMKERN_DEVICE uint32_t swizzle(int row, int piece) {
  static_assert(kRowBytes % 128 == 0);
  return static_cast<uint32_t>(row * kRowBytes + ((piece ^ (row & 7)) << 4));
}

// Copies 16 bytes to shared memory, past the first-level cache; `bytes` < 16 are read, and zeros are written for the
// rest. Both addresses are multiples of 16.
LLMKERN_DEVICE void copy16_async(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)),
               "r"(bytes)
               : "memory");
}
LLMKERN_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all but the last kLeft groups of this thread's copies are there.
template <int kLeft>
LLMKERN_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

LLMKERN_DEVICE void store_shared16(uint32_t to, uint4 x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}
LLMKERN_DEVICE void store_shared4(uint32_t to, uint32_t x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(x) : "memory");
}
LLMKERN_DEVICE uint4 load_shared16(uint32_t from) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(from)
               : "memory");
  return x;
}

// Four 8x8 matrices: lane 8 i + r gives the address of row r of matrix i. In each, lane l gets the elements 2 (l % 4)
// and 2 (l % 4) + 1 of row l / 4; transposed, of column l / 4.
LLMKERN_DEVICE void load_matrices(uint32_t* x, uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(from)
               : "memory");
}
LLMKERN_DEVICE void load_matrices_transposed(uint32_t* x, uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(from)
               : "memory");
}

// c += a b: a (16, 16) by rows, b (16, 8) by columns, c (16, 8) in fp32. Lane l has of c the columns 2 (l % 4) and
// 2 (l % 4) + 1, of the rows l / 4 (c[0], c[1]) and l / 4 + 8 (c[2], c[3]).
LLMKERN_DEVICE void multiply(float* c, const uint32_t* a, uint32_t b0, uint32_t b1, Bf16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
LLMKERN_DEVICE void multiply(float* c, const uint32_t* a, uint32_t b0, uint32_t b1, Fp16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace llmkern::device
