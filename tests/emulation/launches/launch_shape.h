// The grids and blocks that no device takes (CUDA C++ Programming Guide, "Technical Specifications per Compute
// Capability"), which a stand-in of the runtime refuses as the real one does.
#pragma once
#include <cuda_runtime.h>

constexpr bool possible_shape(const dim3& grid, const dim3& block) {
  const bool some = grid.x && grid.y && grid.z && block.x && block.y && block.z;
  const bool blocks = grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535;
  const bool threads = block.x <= 1024 && block.y <= 1024 && block.z <= 64;
  return some && blocks && threads && block.x * block.y * block.z <= 1024;
}

static_assert(possible_shape(dim3(0x7fffffffu, 65535, 65535), dim3(4, 4, 64)));
static_assert(!possible_shape(dim3(1, 65536), dim3(32)) && !possible_shape(dim3(1, 1, 65536), dim3(32)));
static_assert(!possible_shape(dim3(0x80000000u), dim3(32)) && !possible_shape(dim3(0), dim3(32)));
static_assert(!possible_shape(dim3(1), dim3(1025)) && !possible_shape(dim3(1), dim3(33, 32)));
static_assert(!possible_shape(dim3(1), dim3(1, 1, 65)) && !possible_shape(dim3(1), dim3(32, 0)));
