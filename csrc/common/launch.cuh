// Launching a CUDA kernel: the device, the size of the grid, errors as exceptions.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <mutex>
#include <set>
#include <stdexcept>
#include <utility>

#include "launch_error.h"

namespace llmkern::device {

constexpr int kThreads = 128;  // of a block
// The kernels' loops stride over the grid, so that this many blocks serve any size.
constexpr int64_t kMostBlocks = int64_t{1} << 20;

inline void check(cudaError_t error, const char* kernel, int device) {
  if (error != cudaSuccess) throw std::runtime_error(launch_error(error, kernel, device));
}

// Whether anything of this process uses the device. To make an unused one current again would set it up (since CUDA 12
// cudaSetDevice does), with hundreds of megabytes of its memory.
inline bool in_use(int device) {
  using State = int (*)(int, unsigned*, int*);  // of CUdevice, which is an int, to CUresult, 0 for success
  static const auto state = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuDevicePrimaryCtxGetState", &found, 7000, cudaEnableDefault, &result);
    return reinterpret_cast<State>(error == cudaSuccess && result == cudaDriverEntryPointSuccess ? found : nullptr);
  }();
  unsigned flags = 0;
  int active = 1;
  return !state || state(device, &flags, &active) != 0 || active;
}

// Makes `device` the current one of this thread, and the former one again at the end, if it is in use.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* kernel) {
    check(cudaGetDevice(&before_), kernel, device);
    if (before_ == device) return;
    check(cudaSetDevice(device), kernel, device);
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_ && in_use(before_)) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Lets a kernel have all the dynamic shared memory that a block of the device may have beside its static one: for every
// call the same, so that threads with calls of different sizes do not change it under each other's launches.
inline void allow_shared_memory(const void* kernel, const char* name, int device) {
  static std::mutex change;
  static std::set<std::pair<const void*, int>> allowed;
  std::lock_guard<std::mutex> lock(change);
  if (allowed.count({kernel, device})) return;
  cudaFuncAttributes own = {};
  int most = 0;
  check(cudaFuncGetAttributes(&own, kernel), name, device);
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), name, device);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             most - static_cast<int>(own.sharedSizeBytes)),
        name, device);
  allowed.insert({kernel, device});
}

// Unasked a block has 48 KB, static and dynamic together. No kernel has as much as this leaves of static memory.
constexpr int kSharedUnasked = 32 * 1024;

// Launches a kernel of `blocks` blocks with dynamic shared memory, also with more than kernels may have unasked.
template <class... Params, class... Args>
void launch_blocks(const char* name, int device, void* stream, int64_t blocks, int threads, int shared_bytes,
                   void (*kernel)(Params...), const Args&... args) {
  if (blocks <= 0) return;
  if (blocks > INT32_MAX) throw std::runtime_error(std::string(name) + ": a grid has at most 2^31 - 1 blocks");
  DeviceGuard guard(device, name);
  if (shared_bytes > kSharedUnasked) allow_shared_memory(reinterpret_cast<const void*>(kernel), name, device);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, args...), name, device);
}

// Launches a kernel over `items` pieces of work, one for each thread as long as the grid reaches.
template <class... Params, class... Args>
void launch(const char* name, int device, void* stream, int64_t items, void (*kernel)(Params...), const Args&... args) {
  const int64_t blocks = (items + kThreads - 1) / kThreads;
  launch_blocks(name, device, stream, blocks < kMostBlocks ? blocks : kMostBlocks, kThreads, 0, kernel, args...);
}

}  // namespace llmkern::device
