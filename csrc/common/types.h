// Element types that kernels read and write. Plain data: safe to share between instruction sets.
#pragma once
#include <cstdint>

namespace llmkern {

// IEEE binary16 and bfloat16, as bits; the conversions are instructions of the vector headers.
struct Fp16 {
  uint16_t bits;
};
struct Bf16 {
  uint16_t bits;
};

// What register.cpp passes for a tensor's dtype. llmkern/extension.py holds the same numbers.
enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2, i8 = 3, u8 = 4, i32 = 5, i64 = 6, boolean = 7 };

}  // namespace llmkern
