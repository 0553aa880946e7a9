// What Hopper (sm_90a) adds: mbarriers, copies of the tensor memory accelerator (TMA), wgmma, and registers that
// warpgroups give to each other. Only for files named cuda_sm90*.cu, which setup.py compiles for that target alone.
//
// Sources: PTX ISA 8.0 and newer, the chapters on mbarrier, cp.async.bulk.tensor, wgmma and setmaxnreg.
#pragma once
#include <cuda.h>

#include <type_traits>

#include "mma.cuh"

namespace llmkern::device {

constexpr int kWarpgroup = 128;  // threads that issue a wgmma together

// ---- barriers

LLMKERN_DEVICE void barrier_init(const uint64_t& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}
// Makes the initialised barriers known to the copies; __syncthreads makes them known to the threads.
LLMKERN_DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
LLMKERN_DEVICE void barrier_arrive(const uint64_t& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}
// Arrives, and lets the phase last until copies have brought that many bytes.
LLMKERN_DEVICE void barrier_expect(const uint64_t& barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
}
// Waits for the end of the phase of this parity: 0 for the first. That before the first, of parity 1, has ended.
LLMKERN_DEVICE void barrier_wait(const uint64_t& barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::
          "r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

// The numbered barriers of a block, for `threads` of it.
LLMKERN_DEVICE void named_sync(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
LLMKERN_DEVICE void named_arrive(int number, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
// Whether x holds for any of them.
LLMKERN_DEVICE bool named_any(int number, int threads, bool x) {
  uint32_t any;
  asm volatile(
      "{\n.reg .pred x, any;\nsetp.ne.u32 x, %3, 0;\nbar.red.or.pred any, %1, %2, x;\nselp.u32 %0, 1, 0, any;\n"
      "}"
      : "=r"(any)
      : "r"(number), "r"(threads), "r"(static_cast<uint32_t>(x))
      : "memory");
  return any != 0;
}

// ---- copies by tensor maps of four dimensions, the innermost one first (csrc/common/tensor_map.h makes them)

// Brings a map near, before the first copy asks for it.
LLMKERN_DEVICE void tensor_prefetch(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// A box from global into shared memory; its bytes complete at the barrier. Zeros for what is outside of the tensor.
LLMKERN_DEVICE void tensor_load(void* to, const CUtensorMap& map, const uint64_t& barrier, int x, int y, int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(shared_address(to)),
      "l"(&map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(shared_address(&barrier))
      : "memory");
}
// A box from shared into global memory; what is outside of the tensor is not written.
LLMKERN_DEVICE void tensor_store(const CUtensorMap& map, const void* from, int x, int y, int z, int w) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(&map),
               "r"(x), "r"(y), "r"(z), "r"(w), "r"(shared_address(from))
               : "memory");
}
// Ends the stores so far of this thread as far as shared memory goes, which may not end before.
LLMKERN_DEVICE void tensor_store_wait() {
  asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
}
// What this thread has written to shared memory, for copies and wgmma that come behind a barrier.
LLMKERN_DEVICE void async_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- tiles whose rows of 128 bytes are swizzled: 16-byte chunk c of row r lies at c xor r % 8

constexpr int kSpan = 128, kAtom = 8 * kSpan;  // bytes: of a row; of the 8 rows that repeat

LLMKERN_DEVICE int swizzled(int row, int chunk) { return row * kSpan + (chunk ^ row % 8) * 16; }

// A tile for wgmma, at a multiple of 1024 bytes. Where rows are of M or N (k lies along them) only the atoms' distance
// counts, and `leading` is not looked at. Where rows are of k, `leading` is the bytes to the next 128 of M or N.
LLMKERN_DEVICE uint64_t descriptor(const void* tile, int leading = 16) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | uint64_t{kAtom >> 4} << 32 | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(shared_address(tile) >> 4);
}
// The descriptor of what lies that many bytes further on.
LLMKERN_DEVICE uint64_t advance(uint64_t descriptor, int bytes) { return descriptor + (bytes >> 4); }

// Four 8 x 8 matrices of 16 bits: lane 8 i + r has the address of row r of matrix i; as stmatrix distributes them.
LLMKERN_DEVICE void store_matrices(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared::cta.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}

// ---- wgmma: m64nNk16, 16-bit factors, sums in fp32
//
// Thread t of the warpgroup holds of the sums (64, N), as element i, row 16 (t / 32) + t % 32 / 4 + 8 (i / 2 % 2) and
// column 8 (i / 4) + 2 (t % 4) + i % 2.

// Before the first wgmma, and when registers that it uses were written.
LLMKERN_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
LLMKERN_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

#define LLMKERN_REGISTERS_32                                               \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LLMKERN_REGISTERS_64                                                         \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LLMKERN_OPERANDS_32(c, d)                                                                                   \
  c(d[0]), c(d[1]), c(d[2]), c(d[3]), c(d[4]), c(d[5]), c(d[6]), c(d[7]), c(d[8]), c(d[9]), c(d[10]), c(d[11]),     \
      c(d[12]), c(d[13]), c(d[14]), c(d[15]), c(d[16]), c(d[17]), c(d[18]), c(d[19]), c(d[20]), c(d[21]), c(d[22]), \
      c(d[23]), c(d[24]), c(d[25]), c(d[26]), c(d[27]), c(d[28]), c(d[29]), c(d[30]), c(d[31])
#define LLMKERN_OPERANDS_64(c, d)                                                                                   \
  c(d[0]), c(d[1]), c(d[2]), c(d[3]), c(d[4]), c(d[5]), c(d[6]), c(d[7]), c(d[8]), c(d[9]), c(d[10]), c(d[11]),     \
      c(d[12]), c(d[13]), c(d[14]), c(d[15]), c(d[16]), c(d[17]), c(d[18]), c(d[19]), c(d[20]), c(d[21]), c(d[22]), \
      c(d[23]), c(d[24]), c(d[25]), c(d[26]), c(d[27]), c(d[28]), c(d[29]), c(d[30]), c(d[31]), c(d[32]), c(d[33]), \
      c(d[34]), c(d[35]), c(d[36]), c(d[37]), c(d[38]), c(d[39]), c(d[40]), c(d[41]), c(d[42]), c(d[43]), c(d[44]), \
      c(d[45]), c(d[46]), c(d[47]), c(d[48]), c(d[49]), c(d[50]), c(d[51]), c(d[52]), c(d[53]), c(d[54]), c(d[55]), \
      c(d[56]), c(d[57]), c(d[58]), c(d[59]), c(d[60]), c(d[61]), c(d[62]), c(d[63])

// Waits until at most kPending committed groups run. The sums pass through it, so that no use of them comes before.
template <int kPending>
LLMKERN_DEVICE void wgmma_wait(float (&d)[32]) {
  asm volatile("wgmma.wait_group.sync.aligned %32;" : LLMKERN_OPERANDS_32("+f", d) : "n"(kPending) : "memory");
}
template <int kPending>
LLMKERN_DEVICE void wgmma_wait(float (&d)[64]) {
  asm volatile("wgmma.wait_group.sync.aligned %64;" : LLMKERN_OPERANDS_64("+f", d) : "n"(kPending) : "memory");
}
// Registers that wgmma reads stay as they are up to here.
template <int kCount>
LLMKERN_DEVICE void keep(uint32_t (&a)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i++) asm volatile("" : "+r"(a[i])::"memory");
}

// d = a b^T (kAdd: + d): a (64, 16) and b (N, 16) in shared memory, k along the rows.
#define LLMKERN_WGMMA(n, type, registers, a, b, add, operands)                                                       \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" registers "}, " a ", " b ", " add \
               ", 1, 1, 0, 0;"                                                                                       \
               : operands                                                                                            \
               : "l"(a_descriptor), "l"(b_descriptor))
template <class T, bool kAdd>
LLMKERN_DEVICE void wgmma(float (&d)[64], uint64_t a_descriptor, uint64_t b_descriptor, T) {
  constexpr bool kHalf = std::is_same_v<T, Fp16>;
  if constexpr (kHalf && kAdd)
    LLMKERN_WGMMA("128", "f16", LLMKERN_REGISTERS_64, "%64", "%65", "1", LLMKERN_OPERANDS_64("+f", d));
  else if constexpr (kHalf)
    LLMKERN_WGMMA("128", "f16", LLMKERN_REGISTERS_64, "%64", "%65", "0", LLMKERN_OPERANDS_64("=f", d));
  else if constexpr (kAdd)
    LLMKERN_WGMMA("128", "bf16", LLMKERN_REGISTERS_64, "%64", "%65", "1", LLMKERN_OPERANDS_64("+f", d));
  else
    LLMKERN_WGMMA("128", "bf16", LLMKERN_REGISTERS_64, "%64", "%65", "0", LLMKERN_OPERANDS_64("=f", d));
}
#undef LLMKERN_WGMMA

// d += a b: a (64, 16) in registers, a thread's four pairs as of mma.m16n8k16; b (16, N) in shared memory, N along the
// rows.
#define LLMKERN_WGMMA(n, type, registers, a, b, operands)                                                     \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" registers "}, {" a "}, " b \
               ", 1, 1, 1, 1;"                                                                                \
               : operands                                                                                     \
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b_descriptor))
LLMKERN_DEVICE void wgmma_rows(float (&d)[32], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                               uint64_t b_descriptor, Fp16) {
  LLMKERN_WGMMA("64", "f16", LLMKERN_REGISTERS_32, "%32, %33, %34, %35", "%36", LLMKERN_OPERANDS_32("+f", d));
}
LLMKERN_DEVICE void wgmma_rows(float (&d)[32], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                               uint64_t b_descriptor, Bf16) {
  LLMKERN_WGMMA("64", "bf16", LLMKERN_REGISTERS_32, "%32, %33, %34, %35", "%36", LLMKERN_OPERANDS_32("+f", d));
}
LLMKERN_DEVICE void wgmma_rows(float (&d)[64], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                               uint64_t b_descriptor, Fp16) {
  LLMKERN_WGMMA("128", "f16", LLMKERN_REGISTERS_64, "%64, %65, %66, %67", "%68", LLMKERN_OPERANDS_64("+f", d));
}
LLMKERN_DEVICE void wgmma_rows(float (&d)[64], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                               uint64_t b_descriptor, Bf16) {
  LLMKERN_WGMMA("128", "bf16", LLMKERN_REGISTERS_64, "%64, %65, %66, %67", "%68", LLMKERN_OPERANDS_64("+f", d));
}
#undef LLMKERN_WGMMA

// ---- registers: a warpgroup gives up those beyond kCount of each thread, or waits until it gets as many

template <int kCount>
LLMKERN_DEVICE void registers_give() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
LLMKERN_DEVICE void registers_take() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

}  // namespace llmkern::device
