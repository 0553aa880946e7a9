// What bridge.cpp and driver.cpp say to each other: a call's parameters as they lie in memory (the two machines lay
// out structs alike), the pages that the kernel asks for, and those that it changed.
//
// A tensor keeps its address, but for the bits from 44 on: up there, QEMU has its own memory at the addresses where
// the tensors' process has its.
#pragma once
#include <sys/socket.h>

#include <cerrno>
#include <cstdint>

#include "../../csrc/activation/params.h"
#include "../../csrc/attention/params.h"
#include "../../csrc/common/roofline.h"
#include "../../csrc/int8/params.h"
#include "../../csrc/loss/params.h"
#include "../../csrc/norm/params.h"
#include "../../csrc/positional/params.h"

// Every kernel, with its parameters; and those that instruction sets which add products of bytes alone have for
// themselves.
#define LLMKERN_FOR_EACH_PLAIN_KERNEL(X)                \
  X(attention_forward, AttentionParams)                 \
  X(attention_backward, AttentionParams)                \
  X(attention_weights, AttentionParams)                 \
  X(attention_weights_backward, AttentionParams)        \
  X(cache_append, CacheParams)                          \
  X(sinusoidal_add, SinusoidalAddParams)                \
  X(rotary, RotaryParams)                               \
  X(norm, NormParams)                                   \
  X(norm_backward, NormBackwardParams)                  \
  X(gated, GatedParams)                                 \
  X(gated_backward, GatedBackwardParams)                \
  X(cross_entropy, CrossEntropyParams)                  \
  X(cross_entropy_backward, CrossEntropyBackwardParams) \
  X(distillation, DistillationParams)                   \
  X(distillation_backward, DistillationBackwardParams)  \
  X(linear_cross_entropy, LinearCrossEntropyParams)     \
  X(linear_distillation, LinearDistillationParams)
#define LLMKERN_FOR_EACH_BYTE_KERNEL(X) \
  X(int8_pack, Int8PackParams)          \
  X(int8_linear, Int8LinearParams)      \
  X(quantize_rows, QuantizeRowsParams)  \
  X(roofline, RooflineParams)
#define LLMKERN_FOR_EACH_KERNEL(X) LLMKERN_FOR_EACH_PLAIN_KERNEL(X) LLMKERN_FOR_EACH_BYTE_KERNEL(X)

namespace llmkern::wire {

constexpr int kSocket = 3;  // the driver's end
constexpr int64_t kPage = 4096;

#define LLMKERN_NAME(name, Params) name,
enum class Kernel : int64_t { LLMKERN_FOR_EACH_KERNEL(LLMKERN_NAME) };
#undef LLMKERN_NAME

struct Call {  // then `size` bytes of parameters
  Kernel kernel;
  int64_t isa;  // its number in isa.h
  int64_t size;
};

// fetch: the page at the address is wanted; the answer is an int64, kPage and then its bytes, or 0 where the tensors'
// process has no memory. changed: the page as it was sent and as it is now. done: the call has ended, with a
// message of `size` bytes if it failed.
enum class Says : int64_t { fetch, changed, done };
struct Message {
  Says says;
  uint64_t address;
  int64_t size;
};

// All of it, or false.
inline bool send_all(int socket, const void* data, int64_t size) {
  for (auto* at = static_cast<const char*>(data); size > 0;) {
    ssize_t moved = send(socket, at, static_cast<size_t>(size), MSG_NOSIGNAL);
    if (moved < 0 && errno == EINTR) continue;
    if (moved <= 0) return false;
    at += moved, size -= moved;
  }
  return true;
}
inline bool receive_all(int socket, void* data, int64_t size) {
  for (auto* at = static_cast<char*>(data); size > 0;) {
    ssize_t moved = recv(socket, at, static_cast<size_t>(size), 0);
    if (moved < 0 && errno == EINTR) continue;
    if (moved <= 0) return false;
    at += moved, size -= moved;
  }
  return true;
}

}  // namespace llmkern::wire
