// Functions of the GPU's special function unit.
#pragma once
#include "device.cuh"

namespace llmkern::device {

// 2^x and log2 x by the special function unit: relative errors near 2^-22; 2^x below the smallest normal number is 0.
LLMKERN_DEVICE float exp2_quick(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
LLMKERN_DEVICE float log2_quick(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace llmkern::device
