// Tiles of int8_linear for Hopper (compute capability 9.0), by wgmma and TMA. docs/int8_sm90.md tells how they work.
#pragma once
#include <stdexcept>

#include "params.h"

namespace llmkern {

struct Int8CudaParams;

// Why these tiles cannot serve a call, in a sentence; null where they can. Of what p points at, nothing is looked at.
#ifdef LLMKERN_SM90
const char* int8_tiles_sm90_unsupported(const Int8LinearParams& p);
#else
inline const char* int8_tiles_sm90_unsupported(const Int8LinearParams&) {
  return "the library was built without the kernels for Hopper: they need an nvcc that knows sm_90a, and 90 among "
         "LLMKERN_CUDA_ARCHS";
}
#endif

// As int8_tiles_cuda, whose results it gives bit for bit, on a device of compute capability 9.0. Throws
// std::runtime_error where the call is unsupported, the driver too old or the launch fails.
#ifdef LLMKERN_SM90
void int8_tiles_sm90(const Int8CudaParams& p, int device, void* stream);
#else
inline void int8_tiles_sm90(const Int8CudaParams&, int, void*) {
  throw std::runtime_error("int8_tiles_sm90: the library was built without the kernels for Hopper");
}
#endif

}  // namespace llmkern
