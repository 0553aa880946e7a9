// Pages of memory that was just allocated.
#pragma once
#include <cstddef>
#include <cstdint>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace llmkern {

// Asks for large pages for memory of ours that nothing was written to yet: one fault then stands for 512, and so does
// one entry of the processor's table of addresses. Only whole large pages are asked for, so that nothing around them
// changes and no more memory is taken. A system that does not have them, or not for this, goes on as before.
inline void ask_for_large_pages(void* memory, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLargePage = 2 << 20;
  const uintptr_t address = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t begin = (address + kLargePage - 1) / kLargePage * kLargePage;
  const uintptr_t end = (address + bytes) / kLargePage * kLargePage;
  if (memory && begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace llmkern
