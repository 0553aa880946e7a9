// A failed call of the CUDA runtime in words: what failed, and what there is to do.
//
// Source of the codes: CUDA Runtime API, enum cudaError.
#pragma once
#include <cuda_runtime.h>

#include <string>

#include "architectures.h"

namespace llmkern::device {

// 13020 is CUDA 13.2.
inline std::string version(int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); }

// What there is to do, or "" where CUDA's own message says all.
inline std::string advice(cudaError_t error, int device) {
  int driver = 0, toolkit = 0, devices = 0, major = 0, minor = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
  if (cudaRuntimeGetVersion(&toolkit) != cudaSuccess) toolkit = 0;
  std::string built = "the kernels were compiled by CUDA " + version(toolkit);
  switch (error) {
    case cudaErrorInsufficientDriver:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorNoDevice:
    case cudaErrorStubLibrary:
    case cudaErrorSystemDriverMismatch:
      if (driver == 0) return "no NVIDIA driver is installed: " + built + " and need a driver that serves it";
      if (error == cudaErrorNoDevice)
        return "the driver (for CUDA " + version(driver) + ") shows no GPU: see nvidia-smi and CUDA_VISIBLE_DEVICES";
      if (driver >= toolkit) return "the driver serves CUDA " + version(driver) + ": restart after its installation";
      return "the driver serves CUDA up to " + version(driver) + ", " + built +
             ": install a newer driver, or build llmkern again with a toolkit as old as the driver (12.8 or newer)";
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction: {
      bool known = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
                   cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess;
      std::string holds = std::string("the library holds ") + cuda_architectures;
      if (!known) return holds;
      std::string name = std::to_string(major) + std::to_string(minor);
      if (major < 8)
        return "the device is an sm_" + name +
               ", the kernels need sm_80 or newer: use llmkern.backend.use(\"reference\")";
      return "the device is an sm_" + name + ", " + holds + ": build again with LLMKERN_CUDA_ARCHS=\"" + name +
             "\" pip install -e .";
    }
    case cudaErrorInvalidDevice:
      if (cudaGetDeviceCount(&devices) != cudaSuccess) devices = 0;
      return "CUDA devices that are visible: " + std::to_string(devices) + " (numbers count from 0)";
    case cudaErrorInvalidValue:
    case cudaErrorInvalidConfiguration:
    case cudaErrorLaunchOutOfResources:
      return "the launch asks for more than the device has: please report it with the shapes and the device";
    case cudaErrorDevicesUnavailable:
    case cudaErrorMemoryAllocation:
      return "another process may hold the device or its memory: see nvidia-smi";
    case cudaErrorIllegalAddress:
    case cudaErrorMisalignedAddress:
    case cudaErrorLaunchFailure:
    case cudaErrorIllegalInstruction:
    case cudaErrorAssert:
      return "an earlier kernel of this process failed, of llmkern or not, and the process must end: "
             "CUDA_LAUNCH_BLOCKING=1 shows which";
    default:
      return "";
  }
}

inline std::string launch_error(cudaError_t error, const char* kernel, int device) {
  std::string said = std::string(kernel) + ": the launch on CUDA device " + std::to_string(device) +
                     " failed: " + cudaGetErrorString(error);
  std::string more = advice(error, device);
  return more.empty() ? said : said + " (" + more + ")";
}

}  // namespace llmkern::device
