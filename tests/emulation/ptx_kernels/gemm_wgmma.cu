// c (m, n) f32 = a (m, k) * b (n, k) transposed, f16, by wgmma for sm_90a.
//
// Warpgroup 0 computes 64 x 64 of c; one thread of a fifth warp brings tiles of 64 columns of k by TMA into two stages,
// whose 128-byte rows are swizzled. Mbarriers tell when a stage is full, and when it is free again.
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kTileBytes = 64 * 128, kStages = 2;

struct alignas(64) TensorMap {
  char opaque[128];
};

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::
          "r"(barrier),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ void load(uint32_t to, const TensorMap* map, int k, int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(to),
      "l"(map), "r"(k), "r"(row), "r"(barrier)
      : "memory");
}

// 8 rows of 128 bytes lie together, 1024 bytes apart; swizzled by 128 bytes.
__device__ __forceinline__ uint64_t descriptor(uint32_t at) {
  return static_cast<uint64_t>(at >> 4) | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

__device__ __forceinline__ void multiply(float (&d)[32], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, 1, 1, 1, 0, 0;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "l"(a), "l"(b));
}

}  // namespace

extern "C" __global__ void __launch_bounds__(160)
    gemm_f16(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, float* c, int m, int n, int k) {
  extern __shared__ __align__(1024) char tiles[];
  __shared__ uint64_t full[kStages], empty[kStages];
  int row = blockIdx.y * 64, column = blockIdx.x * 64, steps = (k + 63) / 64;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; s++) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(full + s)) : "memory");
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(empty + s)) : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (threadIdx.x >= 128) {
    if (threadIdx.x > 128) return;
    for (int i = 0; i < steps; i++) {
      int s = i % kStages;
      uint32_t barrier = shared_address(full + s), to = shared_address(tiles) + s * 2 * kTileBytes;
      if (i >= kStages) wait(shared_address(empty + s), (i / kStages - 1) % 2);
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(2 * kTileBytes)
                   : "memory");
      load(to, &a, i * 64, row, barrier);
      load(to + kTileBytes, &b, i * 64, column, barrier);
    }
    return;
  }
  float sums[32] = {};
  for (int i = 0; i < steps; i++) {
    int s = i % kStages;
    wait(shared_address(full + s), i / kStages % 2);
    uint32_t at = shared_address(tiles) + s * 2 * kTileBytes;
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int j = 0; j < 4; j++) multiply(sums, descriptor(at + 32 * j), descriptor(at + kTileBytes + 32 * j));
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    if (threadIdx.x == 0)
      asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(empty + s)) : "memory");
  }
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < 32; j++) {
    int i = row + warp * 16 + lane / 4 + j / 2 % 2 * 8, o = column + j / 4 * 8 + lane % 4 * 2 + j % 2;
    if (i < m && o < n) c[static_cast<int64_t>(i) * n + o] = sums[j];
  }
}
