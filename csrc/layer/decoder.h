// A decoder layer as the calls of its kernels, one behind the other, without a way back to Python between them: then
// the other threads are still awake at the next kernel, and what lies between two of them stays in a cache. Knows no
// instruction set: each kernel takes its own. Included by bindings.h alone, behind the kernels' declarations.
#pragma once
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>

#include "../common/parallel.h"
#include "params.h"

namespace llmkern {

class DecoderLayer {
 public:
  explicit DecoderLayer(const DecoderLayerParams& p)
      : p_(p), size_(p.dtype == DType::f32 ? 4 : 2), rows_(p.batch * p.length) {}

  void run() {
    if (!rows_) return;
    lay_out();
    normalise(p_.x, normed_, p_.attention_norm, p_.attention_eps, p_.attention_offset);
    multiply(p_.qkv, normed_, qkv_, nullptr, Activation::none);
    rotate();
    if (p_.keys) keep_values();
    attend();
    multiply(p_.output, attended_, middle_, p_.x, Activation::none);
    normalise(middle_, normed_, p_.feed_norm, p_.feed_eps, p_.feed_offset);
    multiply(p_.gate_up, normed_, gated_, nullptr, p_.gate);
    multiply(p_.down, gated_, p_.out, middle_, Activation::none);
  }

 private:
  static constexpr size_t kKept = size_t{32} << 20;  // more than this is given back after the call

  // One block of memory for all that lies between the kernels.
  void lay_out() {
    const int64_t widths[] = {p_.width, p_.qkv.outputs, p_.output.depth, p_.width, p_.down.depth};
    char** const places[] = {&normed_, &qkv_, &attended_, &middle_, &gated_};
    auto bytes = [&](int64_t elements, int64_t of) { return (elements * of + 63) / 64 * 64; };
    const int64_t sums = bytes(p_.batch * p_.heads * p_.length, 8), statistics = bytes(2 * rows_, 4);
    int64_t all = sums + statistics;
    for (int64_t w : widths) all += bytes(rows_ * w, size_);
    char* at;
    if (static_cast<size_t>(all) <= kKept) {
      at = static_cast<char*>(scratch(Scratch::layer, static_cast<size_t>(all)));
    } else {
      at = static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(all)));
      if (!at) throw std::bad_alloc();
      own_.reset(at);
    }
    for (int i = 0; i < 5; i++) *places[i] = at, at += bytes(rows_ * widths[i], size_);
    logsumexp_ = reinterpret_cast<double*>(at);
    statistics_ = reinterpret_cast<float*>(at + sums);
  }

  void normalise(const void* x, void* out, const void* weight, float eps, float offset) {
    norm({x, nullptr, weight, nullptr, out, nullptr, statistics_, rows_, p_.width, p_.width, 0, eps, offset, false,
          p_.dtype, p_.dtype, p_.threads});
  }

  void multiply(const LayerLinear& w, const void* x, void* out, const void* residual, Activation activation) {
    const int64_t outputs = takes_pairs(activation) ? w.outputs / 2 : w.outputs;
    bool accepted = true;
    int8_linear({x, w.packed, w.scale, w.bias, residual, out, rows_, w.outputs, w.depth, w.depth,
                 residual ? outputs : 0, outputs, w.quantize, activation, p_.dtype, w.bias_dtype, p_.threads,
                 &accepted});
    if (!accepted) throw std::invalid_argument("decoder_layer: packed: not from int8_pack of this layout");
  }

  // Queries where they lie, keys into the cache, or where they lie too.
  void rotate() {
    const int64_t row = p_.qkv.outputs, at = p_.heads * p_.head_width;
    for (int64_t b = 0; b < p_.batch; b++) {
      char* q = qkv_ + b * p_.length * row * size_;
      char* k = q + at * size_;
      char* to = p_.keys ? p_.keys + (b * p_.keys_b + p_.past * p_.keys_row) * size_ : k;
      const int64_t tables = b * p_.table_batch * size_;
      RotaryParams r{};
      r.q = r.q_out = q, r.k = k, r.k_out = to;
      r.cos = static_cast<const char*>(p_.cos) + tables, r.sin = static_cast<const char*>(p_.sin) + tables;
      r.batch = 1, r.heads = p_.heads, r.kv_heads = p_.kv_heads, r.length = p_.length;
      r.width = r.rotated = p_.head_width, r.table_length = p_.length;
      for (auto* steps : {r.q_stride, r.k_stride, r.q_out_stride, r.k_out_stride})
        steps[0] = 0, steps[1] = p_.head_width, steps[2] = row;
      if (p_.keys) r.k_out_stride[1] = p_.keys_h, r.k_out_stride[2] = p_.keys_row;
      r.cos_stride = r.sin_stride = p_.table_row;
      r.dtype = r.table_dtype = p_.dtype, r.threads = p_.threads;
      rotary(r);
    }
  }

  void keep_values() {
    const int64_t row = p_.qkv.outputs, at = (p_.heads + p_.kv_heads) * p_.head_width;
    for (int64_t i = 0; i < rows_; i++) {
      const char* from = qkv_ + (i * row + at) * size_;
      char* to = p_.values + (i / p_.length * p_.values_b + (p_.past + i % p_.length) * p_.values_row) * size_;
      for (int64_t h = 0; h < p_.kv_heads; h++, from += p_.head_width * size_)
        std::memcpy(to + h * p_.values_h * size_, from, static_cast<size_t>(p_.head_width * size_));
    }
  }

  void attend() {
    const int64_t row = p_.qkv.outputs, d = p_.head_width;
    AttentionParams a{};
    a.query = {qkv_, p_.length * row, d, row};
    a.output = {attended_, p_.length * p_.heads * d, d, p_.heads * d};
    if (p_.keys) {
      a.key = {p_.keys, p_.keys_b, p_.keys_h, p_.keys_row};
      a.value = {p_.values, p_.values_b, p_.values_h, p_.values_row};
    } else {
      a.key = {qkv_ + p_.heads * d * size_, p_.length * row, d, row};
      a.value = {qkv_ + (p_.heads + p_.kv_heads) * d * size_, p_.length * row, d, row};
    }
    a.logsumexp = logsumexp_;
    a.mask.left = a.mask.right = kUnbounded;
    if (p_.mask) {
      a.mask.data = p_.mask, a.mask.dtype = DType::boolean;
      a.mask.b = p_.mask_b, a.mask.h = p_.mask_h, a.mask.row = p_.mask_row, a.mask.key = p_.mask_key;
    } else {
      a.mask.right = 0, a.mask.bottom_right = true;
    }
    a.batch = p_.batch, a.heads = p_.heads, a.kv_heads = p_.kv_heads;
    a.queries = p_.length, a.keys = p_.past + p_.length, a.width = a.value_width = d;
    a.scale = p_.scale, a.keep_scale = 1, a.dtype = p_.dtype, a.threads = p_.threads;
    attention_forward(a);
  }

  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  const DecoderLayerParams& p_;
  const int64_t size_, rows_;
  std::unique_ptr<char, Free> own_;
  char *normed_ = nullptr, *qkv_ = nullptr, *attended_ = nullptr, *middle_ = nullptr, *gated_ = nullptr;
  double* logsumexp_ = nullptr;
  float* statistics_ = nullptr;
};

}  // namespace llmkern
