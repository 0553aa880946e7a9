// Stands in for CUDA's own header where the tests compile a .cu file with the host's compiler: the threads of a launch
// run one after another on the CPU. Enough for kernels whose threads do not talk to each other.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline thread_local dim3 blockIdx, threadIdx, blockDim, gridDim;

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
// One device, number 0.
inline cudaError_t cudaSetDevice(int device) { return device ? 101 : cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) { return error ? "invalid device ordinal" : "no error"; }

namespace emulation {

// A GPU faults at a 16-byte access whose address is no multiple of 16.
template <class P>
P* aligned16(P* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16 == 0) return p;
  std::fprintf(stderr, "emulated CUDA: a misaligned access of 16 bytes at %p\n", static_cast<const volatile void*>(p));
  std::abort();
}

}  // namespace emulation

// Few blocks: the loops of the kernels must stride over the grid, and so do here.
template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), const Args&... args) {
  constexpr unsigned kMostBlocks = 3;
  if (config->gridDim.x == 0) return 9;  // as CUDA: an invalid configuration
  gridDim = dim3(config->gridDim.x < kMostBlocks ? config->gridDim.x : kMostBlocks);
  blockDim = config->blockDim;
  for (unsigned block = 0; block < gridDim.x; block++)
    for (unsigned thread = 0; thread < blockDim.x; thread++) {
      blockIdx = dim3(block), threadIdx = dim3(thread);
      kernel(static_cast<Params>(args)...);
    }
  return cudaSuccess;
}
