// Stands in for CUDA's own header where the tests compile a .cu file with the host's compiler: the threads of a launch
// run one after another on the CPU. Enough for kernels whose threads do not talk to each other.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

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

using cudaStream_t = void*;
// Those codes of the runtime that launch_error.h tells apart, with CUDA's numbers.
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorStubLibrary = 34,
  cudaErrorInsufficientDriver = 35,
  cudaErrorDevicesUnavailable = 46,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorAssert = 710,
  cudaErrorIllegalInstruction = 715,
  cudaErrorMisalignedAddress = 716,
  cudaErrorLaunchFailure = 719,
  cudaErrorSystemDriverMismatch = 803,
};
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace emulation {

// What the tests set, and what kernels' launchers called, in order.
struct Runtime {
  cudaError_t launch_fails = cudaSuccess;
  int driver = 13000, toolkit = 13000, devices = 1, major = 8, minor = 0;
  std::vector<std::string> calls;
};
inline Runtime runtime;

inline cudaError_t called(const char* name, cudaError_t result = cudaSuccess) {
  runtime.calls.push_back(name);
  return result;
}

}  // namespace emulation

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return emulation::called("cudaGetDevice");
}
// One device, number 0, unless the tests say otherwise.
inline cudaError_t cudaSetDevice(int device) {
  bool there = device < emulation::runtime.devices;
  return emulation::called("cudaSetDevice", there ? cudaSuccess : cudaErrorInvalidDevice);
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = emulation::runtime.devices;
  return emulation::called("cudaGetDeviceCount");
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = emulation::runtime.driver;
  return emulation::called("cudaDriverGetVersion");
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = emulation::runtime.toolkit;
  return emulation::called("cudaRuntimeGetVersion");
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  bool major = attribute == cudaDevAttrComputeCapabilityMajor;
  *value = major ? emulation::runtime.major : emulation::runtime.minor;
  return emulation::called("cudaDeviceGetAttribute");
}
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0, cudaDriverEntryPointSymbolNotFound = 1 };
constexpr unsigned long long cudaEnableDefault = 0;
inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** found, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* result) {
  *found = nullptr, *result = cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;  // not noted: it is asked once in a process
}
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* own, const void*) {
  *own = {};
  return emulation::called("cudaFuncGetAttributes");
}
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return emulation::called("cudaFuncSetAttribute");
}
inline const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorInvalidDevice) return "invalid device ordinal";
  return error ? "what CUDA says" : "no error";
}

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
  if (emulation::called("cudaLaunchKernelEx", emulation::runtime.launch_fails)) return emulation::runtime.launch_fails;
  if (config->gridDim.x == 0) return cudaErrorInvalidConfiguration;
  gridDim = dim3(config->gridDim.x < kMostBlocks ? config->gridDim.x : kMostBlocks);
  blockDim = config->blockDim;
  for (unsigned block = 0; block < gridDim.x; block++)
    for (unsigned thread = 0; thread < blockDim.x; thread++) {
      blockIdx = dim3(block), threadIdx = dim3(thread);
      kernel(static_cast<Params>(args)...);
    }
  return cudaSuccess;
}
