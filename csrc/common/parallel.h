// Work shared among threads: on torch's own OpenMP threads where they can be found.
#pragma once
#include <cstddef>
#include <cstdint>

namespace llmkern {

using ParallelBody = void (*)(void* context, int thread, int threads);

// Calls body(context, i, n) once for every i in [0, n), n <= threads, and returns when all have ended.
// Serial inside another parallel region. The body must not throw.
void run_parallel(int threads, ParallelBody body, void* context);

// Where the threads come from, in words, for the status page.
const char* parallel_source();

// At least `bytes` of memory, 64-byte aligned, kept by the calling thread from call to call (a fresh
// allocation costs page faults, which weigh more than the arithmetic on it). Each slot holds one block, which
// the next request of the same slot on the same thread takes over. Throws std::bad_alloc.
enum class Scratch { pack, work, quantized, layer, count };
void* scratch(Scratch slot, size_t bytes);

}  // namespace llmkern

#ifdef LLMKERN_ISA
#include "isa.h"
namespace llmkern::LLMKERN_ISA {

// run_parallel for a lambda taking (thread, threads).
template <class Body>
LLMKERN_INLINE void parallel(int threads, Body& body) {
  if (threads <= 1) return body(0, 1);
  run_parallel(threads, [](void* context, int i, int n) { (*static_cast<Body*>(context))(i, n); }, &body);
}

// The next piece of work, for whichever thread asks.
struct Counter {
  int64_t next = 0;
  int64_t take() { return __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED); }
};

// The part of [0, count) that thread i of n takes when all parts are equally dear, cut at multiples of `grain`.
struct Range {
  int64_t begin, end;
};
LLMKERN_INLINE Range share(int64_t count, int64_t grain, int i, int n) {
  int64_t pieces = (count + grain - 1) / grain;
  int64_t begin = pieces * i / n * grain, end = pieces * (i + 1) / n * grain;
  return {begin < count ? begin : count, end < count ? end : count};
}

}  // namespace llmkern::LLMKERN_ISA
#endif
