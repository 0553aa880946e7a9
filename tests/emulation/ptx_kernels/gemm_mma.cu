// Tiled matrix products by mma.sync: c (m, n) = a (m, k) * b (n, k) transposed, for bf16 and int8.
//
// A block of four warps makes 64 x 64 of c; tiles of 64 bytes of k come by cp.async into two stages. A row of a tile is
// 64 bytes; its 16-byte chunks are exchanged by the row, so that neither the copies nor ldmatrix meet in a bank.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kTile = 64, kRowBytes = 64, kStageBytes = 2 * kTile * kRowBytes;

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Chunk c of row r of a tile.
__device__ __forceinline__ uint32_t place(int r, int c) { return r * kRowBytes + ((c ^ (r / 2 % 4)) * 16); }

__device__ __forceinline__ void copy16(uint32_t to, const void* from, bool inside) {
  int bytes = inside ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// Rows [first, first + 64) of x, bytes [k, k + 64) of each; what lies outside becomes zeros. k is a multiple of 64.
__device__ __forceinline__ void load_tile(uint32_t to, const char* x, int first, int rows, int row_bytes, int k) {
  for (int i = threadIdx.x; i < kTile * 4; i += 128) {
    int r = i / 4, c = i % 4;
    bool inside = first + r < rows && k + c * 16 < row_bytes;
    const char* from = inside ? x + static_cast<int64_t>(first + r) * row_bytes + k + c * 16 : x;
    copy16(to + place(r, c), from, inside);
  }
}

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}

__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// row_bytes: bytes of a row of a and b, a multiple of 16.
template <class Sum>
__device__ __forceinline__ void product(const char* a, const char* b, Sum* c, int m, int n, int row_bytes) {
  __shared__ __align__(128) char stages[2][kStageBytes];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int row = blockIdx.y * kTile, column = blockIdx.x * kTile;
  int tiles = (row_bytes + kRowBytes - 1) / kRowBytes;
  auto load = [&](int tile) {
    uint32_t to = shared_address(stages[tile % 2]);
    load_tile(to, a, row, m, row_bytes, tile * kRowBytes);
    load_tile(to + kTile * kRowBytes, b, column, n, row_bytes, tile * kRowBytes);
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  Sum sums[8][4] = {};
  load(0);
  for (int tile = 0; tile < tiles; tile++) {
    if (tile + 1 < tiles) {
      load(tile + 1);
      asm volatile("cp.async.wait_group 1;" ::: "memory");
    } else {
      asm volatile("cp.async.wait_group 0;" ::: "memory");
    }
    __syncthreads();
    uint32_t at = shared_address(stages[tile % 2]), bt = at + kTile * kRowBytes;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      uint32_t x[4], y[4];
      // a: rows of the warp; matrices are (rows 0-7, 8-15) x (chunk 0, 1).
      load_matrices(x, at + place(warp * 16 + lane % 16, half * 2 + lane / 16));
#pragma unroll
      for (int j = 0; j < 4; j++) {
        // b: 16 columns of c; matrices are (columns 0-7: chunk 0, 1), (columns 8-15: chunk 0, 1).
        load_matrices(y, bt + place(j * 16 + lane / 16 * 8 + lane % 8, half * 2 + lane / 8 % 2));
        multiply(sums[2 * j], x, y[0], y[1]);
        multiply(sums[2 * j + 1], x, y[2], y[3]);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int j = 0; j < 8; j++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      int i = row + warp * 16 + lane / 4 + e / 2 * 8, o = column + j * 8 + lane % 4 * 2 + e % 2;
      if (i < m && o < n) c[static_cast<int64_t>(i) * n + o] = sums[j][e];
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(128)
    gemm_bf16(const char* a, const char* b, float* c, int m, int n, int k) {
  product(a, b, c, m, n, 2 * k);
}

extern "C" __global__ void __launch_bounds__(128) gemm_s8(const char* a, const char* b, int* c, int m, int n, int k) {
  product(a, b, c, m, n, k);
}
