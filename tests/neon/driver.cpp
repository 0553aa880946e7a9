// The kernels' side: an AArch64 program, run by QEMU, that serves the calls of bridge.cpp. It has none of the tensors'
// memory: a page comes when the kernel touches it first, and goes back with the result if the kernel changed it.
#include <sys/mman.h>

#include <csignal>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>

#include "../../csrc/common/dispatch.h"
#include "wire.h"

namespace llmkern {
LLMKERN_FOR_EACH_PLAIN_KERNEL(LLMKERN_KERNEL)
LLMKERN_FOR_EACH_BYTE_KERNEL(LLMKERN_BYTE_KERNEL)
}  // namespace llmkern

namespace {

using namespace llmkern;
using namespace llmkern::wire;

std::unordered_map<char*, std::unique_ptr<char[]>> pages;  // as they came, by their addresses
std::mutex mutex;

[[noreturn]] void end() { _exit(1); }  // bridge.cpp says that it happened

// Brings the page at the address, or ends this process where there is none. Another thread may have brought it.
void fetch(char* address) {
  std::lock_guard<std::mutex> lock(mutex);
  if (pages.count(address)) return;
  Message message{Says::fetch, reinterpret_cast<uint64_t>(address), 0};
  int64_t size;
  if (!send_all(kSocket, &message, sizeof message) || !receive_all(kSocket, &size, sizeof size) || !size) end();
  // Filled elsewhere and then moved: no thread may see it half filled.
  void* fresh = mmap(nullptr, kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (fresh == MAP_FAILED || !receive_all(kSocket, fresh, size)) end();
  auto& before = pages[address] = std::make_unique<char[]>(kPage);
  std::memcpy(before.get(), fresh, kPage);
  if (mremap(fresh, kPage, kPage, MREMAP_MAYMOVE | MREMAP_FIXED, address) != address) end();
}

void on_fault(int, siginfo_t* info, void*) {
  // Never while memory is being allocated: malloc touches no tensor.
  fetch(reinterpret_cast<char*>(reinterpret_cast<uint64_t>(info->si_addr) / kPage * kPage));
}

template <class Params, void (*kRun)(const Params&)>
std::string run(int64_t size) {
  Params params;
  if (size != sizeof params || !receive_all(kSocket, &params, size)) end();
  try {
    kRun(params);
  } catch (const std::exception& e) {
    return std::string("in the driver: ") + e.what();
  }
  return "";
}

std::string run(const Call& call) {
#define LLMKERN_NAME(isa, base) #isa,
  static const char* const isas[] = {LLMKERN_FOR_EACH_ISA(LLMKERN_NAME)};
  force_isa(isas[call.isa]);
  switch (call.kernel) {
#define LLMKERN_CASE(name, Params) \
  case Kernel::name:               \
    return run<Params, name>(call.size);
    LLMKERN_FOR_EACH_KERNEL(LLMKERN_CASE)
  }
  end();
}

// Sends what the call changed, and forgets all pages: the tensors' process may change them before the next call.
bool give_back() {
  bool sent = true;
  for (const auto& [address, before] : pages) {
    if (std::memcmp(address, before.get(), kPage)) {
      Message message{Says::changed, reinterpret_cast<uint64_t>(address), 0};
      sent = sent && send_all(kSocket, &message, sizeof message) && send_all(kSocket, before.get(), kPage) &&
             send_all(kSocket, address, kPage);
    }
    munmap(address, kPage);
  }
  pages.clear();
  return sent;
}

}  // namespace

int main() {
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGSEGV, &action, nullptr);
  for (Call call; receive_all(kSocket, &call, sizeof call);) {
    std::string error = run(call);
    Message done{Says::done, 0, static_cast<int64_t>(error.size())};
    if (!give_back() || !send_all(kSocket, &done, sizeof done) || !send_all(kSocket, error.data(), done.size)) end();
  }
}
