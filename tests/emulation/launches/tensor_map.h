// The driver's encoder of tensor maps where there is no driver: maps in the emulator's layout
// (tests/emulation/ptx/tensor_copy.py), after the driver's own checks.
#pragma once
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <cstring>
#include <string>

// Whether every map is refused, as a driver may do for reasons of its own.
inline bool tensor_maps_are_refused = false;

// What the driver refuses, of tiles without an interleaved layout (CUDA driver API, cuTensorMapEncodeTiled).
inline CUresult encode_tensor_map(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                  const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                  const cuuint32_t* steps, CUtensorMapInterleave layout, CUtensorMapSwizzle swizzle,
                                  CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  auto at = reinterpret_cast<uint64_t>(address);
  const uint32_t bytes_each = type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 1 : 2;
  bool good = reinterpret_cast<uintptr_t>(map) % 64 == 0 && at % 16 == 0 && rank >= 1 && rank <= 5 &&
              (bytes_each == 1 || type == CU_TENSOR_MAP_DATA_TYPE_UINT16) && layout == CU_TENSOR_MAP_INTERLEAVE_NONE &&
              box[0] * bytes_each % 16 == 0 && (swizzle != CU_TENSOR_MAP_SWIZZLE_128B || box[0] * bytes_each <= 128);
  for (cuuint32_t i = 0; good && i < rank; i++)
    good = sizes[i] > 0 && sizes[i] <= uint64_t{1} << 32 && box[i] > 0 && box[i] <= 256 && steps[i] == 1 &&
           (i == 0 || (strides[i - 1] % 16 == 0 && strides[i - 1] > 0 && strides[i - 1] < uint64_t{1} << 40));
  if (!good || tensor_maps_are_refused) return CUDA_ERROR_INVALID_VALUE;
  unsigned char bytes[128] = {};
  auto put = [&](int offset, auto x) { std::memcpy(bytes + offset, &x, sizeof(x)); };
  put(0, at), put(8, rank - 1), put(12, bytes_each - 1), put(16, static_cast<uint32_t>(swizzle));
  for (cuuint32_t i = 0; i < 5; i++) {
    put(28 + 4 * i, i < rank ? box[i] : 1u), put(48 + 4 * i, i < rank ? static_cast<uint32_t>(sizes[i]) : 1u);
    if (i > 0 && i < rank) put(72 + 8 * (i - 1), strides[i - 1]);
    put(104 + 4 * i, 1u);
  }
  std::memcpy(map, bytes, sizeof(bytes));
  return CUDA_SUCCESS;
}

inline cudaError_t driver_entry_point(const char* name, bool there, void** found,
                                      cudaDriverEntryPointQueryResult* result) {
  const bool known = there && std::string(name) == "cuTensorMapEncodeTiled";
  *found = known ? reinterpret_cast<void*>(static_cast<PFN_cuTensorMapEncodeTiled_v12000>(encode_tensor_map)) : nullptr;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
