// A CUDA runtime that stands in for the real one where there is no GPU: a launch goes to a function of the test, which
// gives its arguments to the PTX emulator.
#include <map>
#include <string>

#include "launch_shape.h"
#include "tensor_map.h"

namespace {

using Launched = int (*)(const char* kernel, const unsigned* grid, const unsigned* block, size_t shared_bytes,
                         void* stream, void** arguments);
Launched launched;
std::map<const void*, std::string>& kernels() {
  static std::map<const void*, std::string> names;
  return names;
}
std::map<const void*, int>& shared_limits() {
  static std::map<const void*, int> limits;
  return limits;
}
bool driver_is_old;

}  // namespace

extern "C" {

void use(Launched function, bool old) { launched = function, driver_is_old = old; }
void refuse_tensor_maps(bool refused) { tensor_maps_are_refused = refused; }

cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidValue           ? "the launch asks for more shared memory than was allowed"
         : error == cudaErrorInvalidConfiguration ? "no device takes this grid or block"
                                                  : "no error";
}
// What csrc/common/launch_error.h asks before it says what a failed launch may come of.
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int) {
  *value = what == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 232448 : 9;
  return cudaSuccess;
}
// No kernel that is launched by this has shared memory of its own.
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* own, const void*) { return *own = {}, cudaSuccess; }
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value > 232448) return cudaErrorInvalidValue;
  shared_limits()[kernel] = value;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  return driver_entry_point(name, !driver_is_old, found, result);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** arguments) {
  int allowed = shared_limits().count(kernel) ? shared_limits()[kernel] : 49152;
  if (config->dynamicSmemBytes > static_cast<size_t>(allowed)) return cudaErrorInvalidValue;
  if (!possible_shape(config->gridDim, config->blockDim)) return cudaErrorInvalidConfiguration;
  unsigned grid[3] = {config->gridDim.x, config->gridDim.y, config->gridDim.z};
  unsigned block[3] = {config->blockDim.x, config->blockDim.y, config->blockDim.z};
  launched(kernels()[kernel].c_str(), grid, block, config->dynamicSmemBytes, config->stream, arguments);
  return cudaSuccess;
}

// What the code that nvcc makes for the host calls.
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* kernel, char*, const char* name, int, void*, void*, void*, void*,
                            int*) {
  kernels()[kernel] = name;
}
unsigned __cudaPopCallConfiguration(void*, void*, size_t*, void*) { return 1; }
cudaError_t __cudaGetKernel(void*, const void*) { return cudaErrorUnknown; }
cudaError_t __cudaLaunchKernel(void*, dim3, dim3, void**, size_t, void*) { return cudaErrorUnknown; }

}  // extern "C"
