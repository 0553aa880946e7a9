#include "dispatch.h"

#include <atomic>
#include <stdexcept>

#if defined(__x86_64__) && !defined(LLMKERN_AS_AARCH64)
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace llmkern {
namespace {

#if defined(__x86_64__) && !defined(LLMKERN_AS_AARCH64)
// A bit of cpuid's leaf 7; `output` is eax, ebx, ecx or edx.
bool leaf7(unsigned subleaf, int output, int bit) {
  unsigned found[4] = {};
  return __get_cpuid_count(7, subleaf, found, found + 1, found + 2, found + 3) && (found[output] >> bit & 1);
}

// Tiles are state that Linux gives to a process that has asked for it (its documentation: arch/x86/xstate).
bool tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023, kTileData = 18, kTile = 24, kInt8 = 25;
  return leaf7(0, 3, kTile) && leaf7(0, 3, kInt8) && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

// What each instruction set of isa.h asks of the processor (and, through the compiler's own check of XCR0, of the
// operating system).
bool finds(Isa isa) {
#if defined(__x86_64__) && !defined(LLMKERN_AS_AARCH64)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
  switch (isa) {
#ifndef LLMKERN_OLD_COMPILER
    case Isa::amx:
#ifdef LLMKERN_EMULATE_AVX512
      return true;
#endif
      return avx512 && tiles();
    case Isa::avxvnni:
      return avx2 && leaf7(1, 0, 4);
#endif
    case Isa::avx512:
#ifdef LLMKERN_EMULATE_AVX512
      return true;
#endif
      return avx512;
    case Isa::avx2:
      return avx2;
    case Isa::portable:
      return true;
  }
  return false;
#elif defined(__aarch64__)
  constexpr int kDotProducts = 20;  // HWCAP_ASIMDDP
#ifdef __linux__
  if (isa == Isa::neondot) return getauxval(AT_HWCAP) >> kDotProducts & 1;
#elif defined(__APPLE__)
  return true;
#endif
  return isa != Isa::neondot;  // NEON is part of AArch64
#else
  (void)isa;
  return true;
#endif
}

#define LLMKERN_VALUE(isa, base) Isa::isa,
constexpr Isa kAll[] = {LLMKERN_FOR_EACH_ISA(LLMKERN_VALUE)};
constexpr int kCount = sizeof kAll / sizeof *kAll;

bool runs(Isa isa) {
  struct Found {
    bool each[kCount];
    Found() {
      for (int i = 0; i < kCount; i++) each[i] = finds(kAll[i]);
    }
  };
  static const Found found;
  return found.each[static_cast<int>(isa)];
}

Isa best() {
  for (Isa isa : kAll)
    if (runs(isa)) return isa;
  return Isa::portable;
}

std::atomic<Isa>& active() {
  static std::atomic<Isa> isa{best()};
  return isa;
}

}  // namespace

Isa active_isa() { return active().load(std::memory_order_relaxed); }

const char* isa_name(Isa isa) {
#define LLMKERN_STRING(name, base) #name,
  static const char* const names[] = {LLMKERN_FOR_EACH_ISA(LLMKERN_STRING)};
  return names[static_cast<int>(isa)];
}

const char* isa_base(const std::string& name) {
#define LLMKERN_BASE(name, base) #base,
  static const char* const bases[] = {LLMKERN_FOR_EACH_ISA(LLMKERN_BASE)};
  for (Isa isa : kAll)
    if (name == isa_name(isa)) return bases[static_cast<int>(isa)];
  return nullptr;
}

std::vector<std::string> built_isas() {
  std::vector<std::string> names;
  for (Isa isa : kAll) names.push_back(isa_name(isa));
  return names;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (Isa isa : kAll)
    if (runs(isa)) names.push_back(isa_name(isa));
  return names;
}

void force_isa(const std::string& name) {
  if (name.empty()) return active().store(best());
  std::string choices;
  for (Isa isa : kAll) {
    if (!runs(isa)) continue;
    if (name == isa_name(isa)) return active().store(isa);
    choices += (choices.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  throw std::invalid_argument("instruction set: expected one of " + choices +
                              " (those built for and run by this processor), got '" + name + "'");
}

}  // namespace llmkern
