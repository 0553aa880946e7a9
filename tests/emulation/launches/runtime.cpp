// A CUDA runtime that stands in for the real one where there is no GPU: a launch goes to a function of the test, which
// gives its arguments to the PTX emulator; tensor maps are in the emulator's layout
// (tests/emulation/ptx/tensor_copy.py).
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <cstring>
#include <map>
#include <string>

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

// What the driver refuses, of tiles without an interleaved layout (CUDA driver API, cuTensorMapEncodeTiled).
CUresult encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* sizes,
                const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave layout,
                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  auto at = reinterpret_cast<uint64_t>(address);
  bool good = reinterpret_cast<uintptr_t>(map) % 64 == 0 && at % 16 == 0 && rank >= 1 && rank <= 5 &&
              type == CU_TENSOR_MAP_DATA_TYPE_UINT16 && layout == CU_TENSOR_MAP_INTERLEAVE_NONE &&
              box[0] * 2 % 16 == 0 && (swizzle != CU_TENSOR_MAP_SWIZZLE_128B || box[0] * 2 <= 128);
  for (cuuint32_t i = 0; good && i < rank; i++)
    good = sizes[i] > 0 && sizes[i] <= uint64_t{1} << 32 && box[i] > 0 && box[i] <= 256 && steps[i] == 1 &&
           (i == 0 || (strides[i - 1] % 16 == 0 && strides[i - 1] > 0 && strides[i - 1] < uint64_t{1} << 40));
  if (!good) return CUDA_ERROR_INVALID_VALUE;
  unsigned char bytes[128] = {};
  auto put = [&](int offset, auto x) { std::memcpy(bytes + offset, &x, sizeof(x)); };
  put(0, at), put(8, rank - 1), put(12, uint32_t{1}), put(16, static_cast<uint32_t>(swizzle));
  for (cuuint32_t i = 0; i < 5; i++) {
    put(28 + 4 * i, i < rank ? box[i] : 1u), put(48 + 4 * i, i < rank ? static_cast<uint32_t>(sizes[i]) : 1u);
    if (i > 0 && i < rank) put(72 + 8 * (i - 1), strides[i - 1]);
    put(104 + 4 * i, 1u);
  }
  std::memcpy(map, bytes, sizeof(bytes));
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

void use(Launched function, bool old) { launched = function, driver_is_old = old; }

cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "the launch asks for more shared memory than was allowed" : "no error";
}
// What csrc/common/launch_error.h asks before it says what a failed launch may come of.
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 9, cudaSuccess; }
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value > 232448) return cudaErrorInvalidValue;
  shared_limits()[kernel] = value;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  bool known = !driver_is_old && std::string(name) == "cuTensorMapEncodeTiled";
  *found = known ? reinterpret_cast<void*>(static_cast<PFN_cuTensorMapEncodeTiled_v12000>(encode)) : nullptr;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** arguments) {
  int allowed = shared_limits().count(kernel) ? shared_limits()[kernel] : 49152;
  if (config->dynamicSmemBytes > static_cast<size_t>(allowed)) return cudaErrorInvalidValue;
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
