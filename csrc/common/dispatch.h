// Which instruction set serves calls: the best one that the processor has, unless one is forced.
#pragma once
#include <string>
#include <vector>

#include "isa.h"

namespace llmkern {

#define LLMKERN_NAME(isa, base) isa,
enum class Isa { LLMKERN_FOR_EACH_ISA(LLMKERN_NAME) };
#undef LLMKERN_NAME

Isa active_isa();
const char* isa_name(Isa isa);
const char* isa_base(const std::string& name);  // that of isa.h; null for a name that is none
std::vector<std::string> built_isas();          // best first
std::vector<std::string> supported_isas();      // those of them that this processor runs, best first
// Throws std::invalid_argument, naming the choices, where this processor or this build has no such set.
// The empty name goes back to the best.
void force_isa(const std::string& name);

// Declares `name` in every instruction set's namespace, and llmkern::name, which calls the active one's: of products of
// bytes its own, of other kernels its base's.
#define LLMKERN_DECLARE_(isa, base, name, Params) \
  namespace isa {                                 \
  void name(const Params&);                       \
  }
#define LLMKERN_CALL_(isa, base, name) \
  case Isa::isa:                       \
    return base::name(params);
#define LLMKERN_CALL_OWN_(isa, base, name) \
  case Isa::isa:                           \
    return isa::name(params);
#define LLMKERN_KERNEL(name, Params)                                    \
  LLMKERN_FOR_EACH_ISA(LLMKERN_DECLARE_, name, Params)                  \
  inline void name(const Params& params) {                              \
    switch (active_isa()) { LLMKERN_FOR_EACH_ISA(LLMKERN_CALL_, name) } \
  }
#define LLMKERN_BYTE_KERNEL(name, Params)                                   \
  LLMKERN_FOR_EACH_ISA(LLMKERN_DECLARE_, name, Params)                      \
  inline void name(const Params& params) {                                  \
    switch (active_isa()) { LLMKERN_FOR_EACH_ISA(LLMKERN_CALL_OWN_, name) } \
  }

}  // namespace llmkern
