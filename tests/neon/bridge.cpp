// The tensors' side: the kernels of a library built with LLMKERN_AS_AARCH64. Each is a call of driver.cpp, run by QEMU,
// which asks for the pages of memory that the kernel touches; nothing here knows the extent of a tensor.
#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <string>

#include "../../csrc/common/dispatch.h"
#include "wire.h"

extern char** environ;

namespace llmkern {
namespace {

using namespace wire;

// The memory from i * 2^44 on is the driver's from kPlaces[i] * 2^44 on (0: nowhere), where QEMU has none of its own.
// 0: the heap of a program that was not linked to be moved; 5: of one that was; 7: libraries, the stack, mapped memory,
// which is 2 with unlimited stacks. No place is such an i, so that an address that was not moved is seen.
constexpr uint64_t kPlaces[8] = {1, 0, 3, 0, 0, 4, 0, 6};
constexpr int kPlaceBits = 44;

template <class T>
void move(T*& pointer) {
  auto address = reinterpret_cast<uint64_t>(pointer);
  uint64_t place = address >> kPlaceBits < 8 ? kPlaces[address >> kPlaceBits] : 0;
  if (pointer && !place) throw std::runtime_error("tests/neon: a tensor at an address that kPlaces leaves out");
  if (pointer) pointer = reinterpret_cast<T*>(place << kPlaceBits | (address & ((uint64_t{1} << kPlaceBits) - 1)));
}
char* moved_back(uint64_t address) {
  for (uint64_t i = 0; i < 8; i++)
    if (kPlaces[i] && kPlaces[i] == address >> kPlaceBits)
      return reinterpret_cast<char*>(i << kPlaceBits | (address & ((uint64_t{1} << kPlaceBits) - 1)));
  return nullptr;
}

// Every pointer of the parameters.
template <class... Pointers>
void move_all(Pointers*&... pointers) {
  (move(pointers), ...);
}
void move_pointers(AttentionParams& p) {
  move_all(p.query.data, p.key.data, p.value.data, p.output.data, p.grad_output.data, p.dquery.data, p.dkey.data,
           p.dvalue.data, p.weights.data, p.logsumexp, p.grad_logsumexp, p.grad_scores, p.row_sums, p.column_sums,
           p.mask.data, p.mask.lengths, p.alibi, p.sink, p.seed, p.query_bounds.data, p.key_bounds.data, p.pages.table,
           p.key_scales.data, p.value_scales.data);
}
void move_pointers(CacheParams& p) {
  move_all(p.query.data, p.rotated.data, p.key.data, p.value.data, p.key_cache.data, p.value_cache.data, p.key_scales,
           p.value_scales, p.pages.table, p.lengths.data, p.rotation.cos, p.rotation.sin);
}
void move_pointers(Int8PackParams& p) { move_all(p.weight, p.packed, p.bytes); }
void move_pointers(Int8LinearParams& p) {
  move_all(p.x, p.packed, p.weight_scale, p.bias, p.residual, p.out, p.quantize.given, p.accepted);
}
void move_pointers(QuantizeRowsParams& p) { move_all(p.x, p.integer, p.scale, p.zero, p.quantize.given); }
void move_pointers(SinusoidalAddParams& p) { move_all(p.x, p.pe, p.out); }
void move_pointers(RotaryParams& p) { move_all(p.q, p.k, p.q_out, p.k_out, p.cos, p.sin, p.positions); }
void move_pointers(NormParams& p) { move_all(p.x, p.residual, p.weight, p.bias, p.out, p.total, p.statistics); }
void move_pointers(NormBackwardParams& p) {
  move_all(p.grad, p.grad_total, p.total, p.weight, p.statistics, p.dx, p.weight_sums, p.bias_sums);
}
void move_pointers(GatedParams& p) { move_all(p.gate, p.up, p.out); }
void move_pointers(GatedBackwardParams& p) { move_all(p.grad, p.gate, p.up, p.dgate, p.dup); }
void move_pointers(CrossEntropyParams& p) { move_all(p.logits, p.targets, p.loss, p.lse); }
void move_pointers(CrossEntropyBackwardParams& p) { move_all(p.grad, p.logits, p.targets, p.lse, p.out); }
void move_pointers(DistillationParams& p) { move_all(p.student, p.teacher, p.targets, p.soft, p.hard, p.stats); }
void move_pointers(DistillationBackwardParams& p) {
  move_all(p.grad_soft, p.grad_hard, p.student, p.teacher, p.targets, p.stats, p.soft, p.student_out, p.teacher_out);
}
void move_pointers(LinearHead& p) { move_all(p.hidden, p.weight, p.bias); }
void move_pointers(LinearHeadGradients& p) { move_all(p.hidden, p.weight, p.bias); }
void move_pointers(LinearCrossEntropyParams& p) {
  move_pointers(p.head), move_pointers(p.grads);
  move_all(p.targets, p.upstream, p.loss, p.work, p.lse);
}
void move_pointers(LinearDistillationParams& p) {
  move_pointers(p.student), move_pointers(p.teacher), move_pointers(p.grads);
  move_all(p.targets, p.soft, p.hard, p.work);
}
void move_pointers(RooflineParams& p) { move_all(p.data, p.sink, p.work); }

// A process under QEMU that serves one call after the other.
class Driver {
 public:
  void run(Call call, const void* params) {
    std::lock_guard<std::mutex> one_call_at_a_time(mutex_);
    if (process_ != getpid()) start();  // at first, and in a fork
    bool alive = send_all(socket_, &call, sizeof call) && send_all(socket_, params, call.size);
    for (Message message; alive && (alive = receive_all(socket_, &message, sizeof message));) {
      if (message.says == Says::fetch) {
        alive = answer(message.address);
      } else if (message.says == Says::changed) {
        alive = change(message.address);
      } else {
        std::string error(static_cast<size_t>(message.size), ' ');
        alive = receive_all(socket_, error.data(), message.size);
        if (alive && !error.empty()) throw std::runtime_error(error);
        if (alive) return;
      }
    }
    process_ = 0;
    int status = 0;
    waitpid(child_, &status, 0);
    throw std::runtime_error("tests/neon: the driver ended, status " + std::to_string(status) + nowhere_);
  }

 private:
  void start() {
    const char *qemu = std::getenv("LLMKERN_NEON_QEMU"), *driver = std::getenv("LLMKERN_NEON_DRIVER");
    if (!qemu || !driver) throw std::runtime_error("tests/neon: LLMKERN_NEON_QEMU and LLMKERN_NEON_DRIVER are not set");
    if (socket_ >= 0) close(socket_), close(memory_);
    int ends[2];
    memory_ = open("/proc/self/mem", O_RDONLY | O_CLOEXEC);
    if (memory_ < 0 || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends))
      throw std::runtime_error("tests/neon: no socket, or no /proc");
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, ends[1], kSocket);
    std::string words[] = {qemu, driver};
    char* arguments[] = {words[0].data(), words[1].data(), nullptr};
    int failed = posix_spawnp(&child_, qemu, &actions, nullptr, arguments, environ);
    posix_spawn_file_actions_destroy(&actions);
    close(ends[1]);
    socket_ = ends[0];
    if (failed) throw std::runtime_error(std::string("tests/neon: could not start ") + qemu);
    process_ = getpid();
    nowhere_.clear();
  }
  // Through /proc, where an address without memory is an error and not the end of this process.
  bool answer(uint64_t address) {
    char bytes[kPage];
    char* page = moved_back(address);
    int64_t size = page ? pread(memory_, bytes, kPage, static_cast<off_t>(reinterpret_cast<uintptr_t>(page))) : 0;
    if (size != kPage) {
      size = 0;
      char text[96];
      std::snprintf(text, sizeof text, page ? ": no memory at %p" : ": no memory at %p, which move_pointers left out",
                    page ? page : reinterpret_cast<void*>(address));
      nowhere_ = text;
    }
    return send_all(socket_, &size, sizeof size) && send_all(socket_, bytes, size);
  }
  // Only bytes that differ: what lies beside them may be another thread's.
  bool change(uint64_t address) {
    static char before[kPage], after[kPage];
    if (!receive_all(socket_, before, kPage) || !receive_all(socket_, after, kPage)) return false;
    char* page = moved_back(address);
    for (int64_t i = 0; i < kPage; i++)
      if (before[i] != after[i]) page[i] = after[i];
    return true;
  }

  std::mutex mutex_;
  pid_t process_ = 0;  // that the driver belongs to; 0: there is none
  pid_t child_ = 0;
  int socket_ = -1, memory_ = -1;
  std::string nowhere_;
};

template <class Params>
void call(Kernel kernel, Isa isa, Params params) {
  static Driver* driver = nullptr;
  static std::once_flag made;
  std::call_once(made, [] { driver = new Driver; });
  move_pointers(params);
  driver->run({kernel, static_cast<int64_t>(isa), sizeof params}, &params);
}

}  // namespace

#define LLMKERN_DEFINE_(isa, base, name, Params)                            \
  namespace isa {                                                           \
  void name(const Params& params) { call(Kernel::name, Isa::isa, params); } \
  }
#define LLMKERN_DEFINE(name, Params) LLMKERN_FOR_EACH_ISA(LLMKERN_DEFINE_, name, Params)
LLMKERN_FOR_EACH_KERNEL(LLMKERN_DEFINE)

}  // namespace llmkern
