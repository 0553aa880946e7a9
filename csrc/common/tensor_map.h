// Tensor maps: what the tensor memory accelerator (TMA) of Hopper knows of a tensor in global memory. For the host.
#pragma once
#include <cudaTypedefs.h>

#include "launch.cuh"

namespace llmkern::device {

// The driver's encoder, asked for at run time, so that the library loads where there is no driver.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder(const char* kernel) {
  static const auto encoder = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? found : nullptr;
  }();
  if (!encoder)
    throw std::runtime_error(std::string(kernel) +
                             ": the CUDA driver has no cuTensorMapEncodeTiled: it needs one for CUDA 12.0 or newer");
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(encoder);
}

// A tensor of four dimensions, the innermost one first and contiguous, of elements of 2 bytes, or 1; steps count
// elements, as does the box that a copy moves. Rows of the box are 128 bytes, swizzled as csrc/common/sm90.cuh has it.
struct TensorShape {
  const char* name;  // as the caller knows it
  const void* data;
  int64_t sizes[4], steps[4];
  int box[4];
  int element_bytes = 2;
};
// What to say of a tensor that the encoder refuses, which checks before a launch should not have let through.
inline std::string refusal(const TensorShape& shape, const char* kernel, int error) {
  auto listed = [](const auto& numbers) {
    std::string all;
    for (auto n : numbers) all += (all.empty() ? "" : ", ") + std::to_string(n);
    return all;
  };
  return std::string(kernel) + ": cuTensorMapEncodeTiled refused " + shape.name + " with error " +
         std::to_string(error) + ": sizes (" + listed(shape.sizes) + "), steps (" + listed(shape.steps) +
         "), address modulo 16: " + std::to_string(reinterpret_cast<uintptr_t>(shape.data) % 16) +
         "; please report it with these numbers, and meanwhile take another: llmkern.backend.use(\"triton\")";
}
inline CUtensorMap tensor_map(const TensorShape& shape, const char* kernel) {
  cuuint64_t sizes[4], strides[3];
  cuuint32_t box[4];
  const cuuint32_t ones[4] = {1, 1, 1, 1};
  for (int i = 0; i < 4; i++) {
    sizes[i] = static_cast<cuuint64_t>(shape.sizes[i]);
    box[i] = static_cast<cuuint32_t>(shape.box[i]);
    // The step of a dimension of one element means nothing, and may be one that the encoder refuses.
    if (i > 0)
      strides[i - 1] = shape.sizes[i] == 1 ? 16 : static_cast<cuuint64_t>(shape.steps[i] * shape.element_bytes);
  }
  const auto type = shape.element_bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16;
  CUtensorMap map;
  CUresult result = tensor_map_encoder(kernel)(&map, type, 4, const_cast<void*>(shape.data), sizes, strides, box, ones,
                                               CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) throw std::runtime_error(refusal(shape, kernel, static_cast<int>(result)));
  return map;
}

}  // namespace llmkern::device
