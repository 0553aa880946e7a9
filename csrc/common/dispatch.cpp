#include "dispatch.h"

#include <atomic>
#include <stdexcept>

namespace llmkern {
namespace {

// What each instruction set of isa.h asks of the processor (and, through the compiler's own check of XCR0, of the
// operating system).
bool runs(Isa isa) {
#if defined(__x86_64__) && !defined(LLMKERN_AS_AARCH64)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  switch (isa) {
    case Isa::avx512:
#ifdef LLMKERN_EMULATE_AVX512
      return true;
#endif
      return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
    case Isa::avx2:
      return avx2;
    case Isa::portable:
      return true;
  }
  return false;
#else
  (void)isa;
  return true;  // NEON is part of AArch64
#endif
}

#define LLMKERN_VALUE(isa) Isa::isa,
constexpr Isa kAll[] = {LLMKERN_FOR_EACH_ISA(LLMKERN_VALUE)};

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
#define LLMKERN_STRING(name) #name,
  static const char* const names[] = {LLMKERN_FOR_EACH_ISA(LLMKERN_STRING)};
  return names[static_cast<int>(isa)];
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
