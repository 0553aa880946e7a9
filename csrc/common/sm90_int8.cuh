// Products of bytes by wgmma, for sm_90a (PTX ISA, "wgmma.mma_async" with .u8 and .s8).
//
// d (64, N) = a b^T (kAdd: + d) of 32 values of k: a (64, 32) unsigned or signed, b (N, 32) signed, both in shared
// memory with k along the rows, sums in int32. Threads hold d as those of sm90.cuh do.
#pragma once
#include "sm90.cuh"

namespace llmkern::device {

#define LLMKERN_REGISTERS_96                                                                                    \
  LLMKERN_REGISTERS_64                                                                                          \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, " \
  "%85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define LLMKERN_OPERANDS_96(c, d) LLMKERN_OPERANDS_64(c, d), LLMKERN_OPERANDS_32(c, (d + 64))
#define LLMKERN_REGISTERS_128                                                                    \
  LLMKERN_REGISTERS_64                                                                           \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "           \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define LLMKERN_OPERANDS_128(c, d) LLMKERN_OPERANDS_64(c, d), LLMKERN_OPERANDS_64(c, (d + 64))

#define LLMKERN_WGMMA(n, type, registers, a, b, add, operands)                                                     \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" n "k32.s32." type ".s8 {" registers "}, " a ", " b ", " add ";" \
               : operands                                                                                          \
               : "l"(a_descriptor), "l"(b_descriptor))
template <bool kSigned, bool kAdd>
LLMKERN_DEVICE void wgmma_bytes(int32_t (&d)[64], uint64_t a_descriptor, uint64_t b_descriptor) {
  if constexpr (kSigned && kAdd)
    LLMKERN_WGMMA("128", "s8", LLMKERN_REGISTERS_64, "%64", "%65", "1", LLMKERN_OPERANDS_64("+r", d));
  else if constexpr (kSigned)
    LLMKERN_WGMMA("128", "s8", LLMKERN_REGISTERS_64, "%64", "%65", "0", LLMKERN_OPERANDS_64("=r", d));
  else if constexpr (kAdd)
    LLMKERN_WGMMA("128", "u8", LLMKERN_REGISTERS_64, "%64", "%65", "1", LLMKERN_OPERANDS_64("+r", d));
  else
    LLMKERN_WGMMA("128", "u8", LLMKERN_REGISTERS_64, "%64", "%65", "0", LLMKERN_OPERANDS_64("=r", d));
}
template <bool kSigned, bool kAdd>
LLMKERN_DEVICE void wgmma_bytes(int32_t (&d)[96], uint64_t a_descriptor, uint64_t b_descriptor) {
  if constexpr (kSigned && kAdd)
    LLMKERN_WGMMA("192", "s8", LLMKERN_REGISTERS_96, "%96", "%97", "1", LLMKERN_OPERANDS_96("+r", d));
  else if constexpr (kSigned)
    LLMKERN_WGMMA("192", "s8", LLMKERN_REGISTERS_96, "%96", "%97", "0", LLMKERN_OPERANDS_96("=r", d));
  else if constexpr (kAdd)
    LLMKERN_WGMMA("192", "u8", LLMKERN_REGISTERS_96, "%96", "%97", "1", LLMKERN_OPERANDS_96("+r", d));
  else
    LLMKERN_WGMMA("192", "u8", LLMKERN_REGISTERS_96, "%96", "%97", "0", LLMKERN_OPERANDS_96("=r", d));
}
template <bool kSigned, bool kAdd>
LLMKERN_DEVICE void wgmma_bytes(int32_t (&d)[128], uint64_t a_descriptor, uint64_t b_descriptor) {
  static_assert(!kSigned);
  if constexpr (kAdd)
    LLMKERN_WGMMA("256", "u8", LLMKERN_REGISTERS_128, "%128", "%129", "1", LLMKERN_OPERANDS_128("+r", d));
  else
    LLMKERN_WGMMA("256", "u8", LLMKERN_REGISTERS_128, "%128", "%129", "0", LLMKERN_OPERANDS_128("=r", d));
}
#undef LLMKERN_WGMMA
// The same where `adds` is known as the kernel runs, the same for all threads; where it is false, d need not be written
// before.
LLMKERN_DEVICE void wgmma_bytes_signed(int32_t (&d)[64], uint64_t a_descriptor, uint64_t b_descriptor, bool adds) {
  asm volatile(
      "{\n.reg .pred adds;\nsetp.ne.b32 adds, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 "
      "{" LLMKERN_REGISTERS_64 "}, %64, %65, adds;\n}"
      : LLMKERN_OPERANDS_64("+r", d)
      : "l"(a_descriptor), "l"(b_descriptor), "r"(static_cast<int>(adds)));
}

// Waits until at most kPending committed groups run. Sums are used behind wgmma_sums only.
template <int kPending>
LLMKERN_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// No use of the sums behind this comes before a wait that stands before it.
template <int kCount>
LLMKERN_DEVICE void wgmma_sums(int32_t (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i++) asm volatile("" : "+r"(d[i])::"memory");
}

}  // namespace llmkern::device
