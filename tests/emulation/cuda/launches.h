// Stands in for the CUDA runtime where the tests link host code that nvcc compiled: a launch is noted, not made. What
// the launchers decide (kernel, grid, shared memory, arguments) is then executed by the PTX emulator.
#pragma once
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "../../../csrc/common/call.h"
#include "../launches/launch_shape.h"
#include "../launches/tensor_map.h"

namespace launches {

struct Noted {
  std::string kernel;
  std::vector<unsigned> grid, block;
  size_t shared;
  std::vector<std::string> arguments;
};
// A kernel's name without its file's own namespace, whose name is another in each compilation.
inline std::string bare(const std::string& name) {
  const size_t at = name.find("_GLOBAL__N__");
  if (at == std::string::npos) return name;
  size_t digits = at;
  while (name[digits - 1] >= '0' && name[digits - 1] <= '9') digits--;
  return name.substr(0, digits) + name.substr(at + std::stoul(name.substr(digits, at - digits)));
}
// Names of kernels, by the address that a launch gives; kernels are made known before other globals are made.
inline std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> all;
  return all;
}
inline std::map<const void*, size_t> allowed;  // dynamic shared memory that was asked for
inline std::map<std::string, std::vector<size_t>> sizes;
inline std::map<std::string, size_t> statics;  // shared memory that a kernel declares
inline std::vector<Noted> noted;
constexpr size_t kAlwaysAllowed = 48 * 1024, kMost = 99 * 1024, kMostHopper = 227 * 1024;  // kMost: of sm_86, 89, 120

inline cudaError_t note(const cudaLaunchConfig_t& c, const void* function, void** arguments) {
  auto known = names().find(function);
  if (known == names().end() || !sizes.count(known->second)) return cudaErrorInvalidDeviceFunction;
  const bool hopper = known->second.find("sm90") != std::string::npos;
  const size_t both = c.dynamicSmemBytes + statics[known->second];
  const bool fits = both <= kAlwaysAllowed || (allowed.count(function) && c.dynamicSmemBytes <= allowed[function]);
  if (!fits || both > (hopper ? kMostHopper : kMost)) return cudaErrorInvalidConfiguration;
  if (!possible_shape(c.gridDim, c.blockDim)) return cudaErrorInvalidConfiguration;
  Noted n{known->second,
          {c.gridDim.x, c.gridDim.y, c.gridDim.z},
          {c.blockDim.x, c.blockDim.y, c.blockDim.z},
          c.dynamicSmemBytes,
          {}};
  for (size_t i = 0; i < sizes[n.kernel].size(); i++)
    n.arguments.emplace_back(static_cast<const char*>(arguments[i]), sizes[n.kernel][i]);
  noted.push_back(n);
  return cudaSuccess;
}

inline void bind(pybind11::module_& m) {
  namespace py = pybind11;
  // In place of tensors the functions take what has a method data_ptr, as they do where torch has no exchange API.
  llmkern::call::torch().data_ptr = PyUnicode_InternFromString("data_ptr");
  m.def("bare", bare, "A kernel's name without its file's own namespace.");
  m.def(
      "set_sizes",
      [](const std::string& kernel, const std::vector<size_t>& bytes, size_t shared) {
        sizes[kernel] = bytes, statics[kernel] = shared;
      },
      "The sizes of a kernel's arguments, which the runtime is not told, and of its own shared memory.");
  m.def(
      "take",
      [] {
        py::list all;
        for (const Noted& n : noted) {
          py::list arguments;
          for (const std::string& a : n.arguments) arguments.append(py::bytes(a));
          all.append(py::make_tuple(n.kernel, n.grid, n.block, n.shared, arguments));
        }
        noted.clear();
        return all;
      },
      "The launches since the last call: kernel, grid, block, bytes of shared memory, arguments as bytes.");
}

}  // namespace launches

extern "C" {
void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  launches::names()[host] = launches::bare(name);
}
// Of the stubs for <<<>>>, which no launcher uses.
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorNotSupported; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }
unsigned __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return 1; }

cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device ? cudaErrorInvalidDevice : cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidDevice ? "invalid device ordinal" : "invalid launch";
}
// What csrc/common/launch_error.h asks before it says what a failed launch may come of.
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int) {
  *value = what == cudaDevAttrMaxSharedMemoryPerBlockOptin ? static_cast<int>(launches::kMostHopper) : 9;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* own, const void* function) {
  *own = {};
  own->sharedSizeBytes = launches::statics[launches::names()[function]];
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute what, int value) {
  const size_t own = launches::statics[launches::names()[function]];
  if (what != cudaFuncAttributeMaxDynamicSharedMemorySize || static_cast<size_t>(value) + own > launches::kMostHopper)
    return cudaErrorInvalidValue;
  launches::allowed[function] = static_cast<size_t>(value);
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  return driver_entry_point(name, true, found, result);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  return launches::note(*config, function, arguments);
}
}
