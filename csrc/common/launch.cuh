// Launching a CUDA kernel: the device, the size of the grid, errors as exceptions.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace llmkern::device {

constexpr int kThreads = 128;  // of a block
// The kernels' loops stride over the grid, so that this many blocks serve any size.
constexpr int64_t kMostBlocks = int64_t{1} << 20;

inline void check(cudaError_t error, const char* kernel, int device) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(kernel) + ": the launch on CUDA device " + std::to_string(device) +
                           " failed: " + cudaGetErrorString(error));
}

// Makes `device` the current one of this thread, and the former one again at the end.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* kernel) {
    check(cudaGetDevice(&before_), kernel, device);
    if (before_ == device) return;
    check(cudaSetDevice(device), kernel, device);
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Launches a kernel of `blocks` blocks, at most 2^31 - 1.
template <class... Params, class... Args>
void launch_blocks(const char* name, int device, void* stream, int64_t blocks, int threads, void (*kernel)(Params...),
                   const Args&... args) {
  DeviceGuard guard(device, name);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, args...), name, device);
}

// Launches a kernel over `items` pieces of work, one for each thread as long as the grid reaches.
template <class... Params, class... Args>
void launch(const char* name, int device, void* stream, int64_t items, void (*kernel)(Params...), const Args&... args) {
  if (items <= 0) return;
  int64_t blocks = (items + kThreads - 1) / kThreads;
  launch_blocks(name, device, stream, blocks < kMostBlocks ? blocks : kMostBlocks, kThreads, kernel, args...);
}

}  // namespace llmkern::device
