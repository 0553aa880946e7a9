// The instruction sets of the CPU backend, and the namespace that each is compiled into.
//
// Every csrc/<family>/cpu.cpp is compiled once per instruction set, with LLMKERN_ISA set to its name.
// All that such a file defines, and every header of ours that it includes for vector code, lies in
// namespace llmkern::LLMKERN_ISA. Two objects therefore never define the same inline function with
// different machine code, which the linker would merge into one, chosen by link order.
#pragma once

#ifdef __CUDACC__
#define LLMKERN_INLINE static __host__ __device__ __forceinline__
#else
#define LLMKERN_INLINE static inline __attribute__((always_inline))
#endif

// Each with its base: instruction sets that add products of bytes alone have int8 kernels of their own, and take all
// else from the base. LLMKERN_AS_AARCH64: the kernels are those of an AArch64 program beside the library (tests/neon).
// LLMKERN_OLD_COMPILER: it does not know the newer of them.
#if defined(__x86_64__) && !defined(LLMKERN_AS_AARCH64)
#ifdef LLMKERN_OLD_COMPILER
#define LLMKERN_FOR_EACH_ISA(X, ...) \
  X(avx512, avx512, ##__VA_ARGS__) X(avx2, avx2, ##__VA_ARGS__) X(portable, portable, ##__VA_ARGS__)  // best first
#else
#define LLMKERN_FOR_EACH_ISA(X, ...) \
  X(amx, avx512, ##__VA_ARGS__)      \
  X(avx512, avx512, ##__VA_ARGS__)   \
  X(avxvnni, avx2, ##__VA_ARGS__) X(avx2, avx2, ##__VA_ARGS__) X(portable, portable, ##__VA_ARGS__)
#endif
#elif (defined(__aarch64__) || defined(LLMKERN_AS_AARCH64)) && defined(LLMKERN_OLD_COMPILER)
#define LLMKERN_FOR_EACH_ISA(X, ...) X(neon, neon, ##__VA_ARGS__) X(portable, portable, ##__VA_ARGS__)
#elif defined(__aarch64__) || defined(LLMKERN_AS_AARCH64)
#define LLMKERN_FOR_EACH_ISA(X, ...) \
  X(neondot, neon, ##__VA_ARGS__) X(neon, neon, ##__VA_ARGS__) X(portable, portable, ##__VA_ARGS__)
#else
#define LLMKERN_FOR_EACH_ISA(X, ...) X(portable, portable, ##__VA_ARGS__)
#endif
