// A softmax of rows by shuffles, and sums of rows by shared memory and atomics.
#include <cuda_runtime.h>

// out (rows, width) = softmax of x; a block of four warps takes a row each.
extern "C" __global__ void softmax_rows(const float* x, float* out, int rows, int width) {
  int row = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= rows) return;
  x += static_cast<long long>(row) * width, out += static_cast<long long>(row) * width;
  float most = -INFINITY;
  for (int i = lane; i < width; i += 32) most = fmaxf(most, x[i]);
  for (int step = 16; step; step /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
  float sum = 0;
  for (int i = lane; i < width; i += 32) sum += __expf(x[i] - most);
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  for (int i = lane; i < width; i += 32) out[i] = __expf(x[i] - most) / sum;
}

// out[0] += the sum of x, out[1] = the largest as an int, blocks[0]: how many blocks have added theirs.
extern "C" __global__ void sum_blocks(const int* x, int* out, int n, unsigned* blocks) {
  __shared__ int part[128];
  int sum = 0;
  for (int i = blockIdx.x * 128 + threadIdx.x; i < n; i += gridDim.x * 128) sum += x[i];
  part[threadIdx.x] = sum;
  __syncthreads();
  for (int step = 64; step; step /= 2) {
    if (threadIdx.x < step) part[threadIdx.x] += part[threadIdx.x + step];
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    atomicAdd(out, part[0]);
    atomicMax(out + 1, part[0]);
    atomicInc(blocks, 1u << 30);
  }
}

// out[0] = the sum of x: each block leaves its part, the last one to finish adds them.
extern "C" __global__ void sum_by_the_last(const float* x, float* parts, unsigned* finished, float* out, int n) {
  __shared__ float part[4];
  __shared__ bool last;
  float sum = 0;
  for (int i = blockIdx.x * 128 + threadIdx.x; i < n; i += gridDim.x * 128) sum += x[i];
  for (int step = 16; step; step /= 2) sum += __shfl_down_sync(0xffffffffu, sum, step);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = part[0] + part[1] + part[2] + part[3];
    __threadfence();
    last = atomicAdd(finished, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  if (threadIdx.x == 0) {
    __threadfence();
    float total = 0;
    for (int i = 0; i < gridDim.x; i++) total += parts[i];
    out[0] = total;
  }
}
