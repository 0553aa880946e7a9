// The attention kernels as Python functions; included by register.cpp alone.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "../common/call.h"
#include "../common/dispatch.h"
#include "checks.h"
#include "params.h"

namespace llmkern {

LLMKERN_KERNEL(attention_forward, AttentionParams)
LLMKERN_KERNEL(attention_backward, AttentionParams)
LLMKERN_KERNEL(attention_weights, AttentionParams)
LLMKERN_KERNEL(attention_weights_backward, AttentionParams)
LLMKERN_KERNEL(cache_append, CacheParams)

// What every kernel takes before the tensors of its own: the mask, the lengths, the log-sum-exp, the slopes of ALiBi,
// the sink, the seed of the dropout.
constexpr int kRuleTensors = 6;

template <AttentionTensor AttentionParams::*... kTensors>
void fill_attention(AttentionParams& p, void* const* addresses) {
  p.mask.data = static_cast<const char*>(addresses[0]);
  p.mask.lengths = static_cast<const char*>(addresses[1]);
  p.logsumexp = static_cast<double*>(addresses[2]);
  p.alibi = static_cast<const float*>(addresses[3]);
  p.sink = static_cast<const float*>(addresses[4]);
  p.seed = static_cast<const int64_t*>(addresses[5]);
  int i = kRuleTensors;
  (((p.*kTensors).data = static_cast<char*>(addresses[i++])), ...);
}

template <AttentionTensor AttentionParams::*... kTensors>
void fill_varlen(AttentionParams& p, void* const* addresses) {
  p.query_bounds.data = static_cast<const char*>(addresses[0]);
  p.key_bounds.data = static_cast<const char*>(addresses[1]);
  p.queries = longest("q", p.query_bounds, p.batch, p.queries);
  p.keys = longest("k", p.key_bounds, p.batch, p.keys);
  fill_attention<kTensors...>(p, addresses + 2);
}

// Gradients besides those of the tensors: of the log-sum-exp, given; of the scores and the sums of the rows, asked for.
template <void (*kFill)(AttentionParams&, void* const*)>
void fill_backward(AttentionParams& p, void* const* addresses) {
  p.grad_logsumexp = static_cast<const double*>(addresses[0]);
  p.grad_scores = static_cast<float*>(addresses[1]);
  p.row_sums = static_cast<float*>(addresses[2]);
  kFill(p, addresses + 3);
}

inline void fill_column_sums(AttentionParams& p, void* const* addresses) {
  p.column_sums = static_cast<float*>(addresses[0]);
  fill_attention<&AttentionParams::query, &AttentionParams::key>(p, addresses + 1);
}

inline void fill_cached(AttentionParams& p, void* const* addresses) {
  p.pages.table = static_cast<const char*>(addresses[0]);
  p.key_scales.data = static_cast<const float*>(addresses[1]);
  p.value_scales.data = static_cast<const float*>(addresses[2]);
  using P = AttentionParams;
  fill_attention<&P::query, &P::key, &P::value, &P::output>(p, addresses + 3);
  p.keys = check_cache({p.mask.lengths, p.mask.lengths_64, p.mask.lengths_step}, p.mask.lengths_more, p.pages, p.batch,
                       p.keys);
}

inline void fill_append(CacheParams& p, void* const* addresses) {
  p.lengths.data = static_cast<const char*>(addresses[0]);
  p.pages.table = static_cast<const char*>(addresses[1]);
  p.key_scales = static_cast<float*>(addresses[2]), p.value_scales = static_cast<float*>(addresses[3]);
  p.rotation.cos = addresses[4], p.rotation.sin = addresses[5];
  AttentionTensor* tensors[] = {&p.query, &p.rotated, &p.key, &p.value, &p.key_cache, &p.value_cache};
  for (int i = 0; i < 6; i++) tensors[i]->data = static_cast<char*>(addresses[6 + i]);
  check_cache(p.lengths, p.added, p.pages, p.batch, p.capacity);
  check_positions(p);
}

template <void (*kRun)(const AttentionParams&), AttentionTensor AttentionParams::*... kTensors>
void define_attention(pybind11::module_& m, const char* name) {
  call::define_kernel<AttentionParams, kRuleTensors + sizeof...(kTensors), fill_attention<kTensors...>, kRun>(m, name);
}
template <void (*kRun)(const AttentionParams&), AttentionTensor AttentionParams::*... kTensors>
void define_varlen(pybind11::module_& m, const char* name) {
  call::define_kernel<AttentionParams, 2 + kRuleTensors + sizeof...(kTensors), fill_varlen<kTensors...>, kRun>(m, name);
}
template <void (*kRun)(const AttentionParams&), AttentionTensor AttentionParams::*... kTensors>
void define_backward(pybind11::module_& m, const char* name) {
  call::define_kernel<AttentionParams, 3 + kRuleTensors + sizeof...(kTensors),
                      fill_backward<fill_attention<kTensors...>>, kRun>(m, name);
}
template <void (*kRun)(const AttentionParams&), AttentionTensor AttentionParams::*... kTensors>
void define_varlen_backward(pybind11::module_& m, const char* name) {
  call::define_kernel<AttentionParams, 3 + 2 + kRuleTensors + sizeof...(kTensors),
                      fill_backward<fill_varlen<kTensors...>>, kRun>(m, name);
}

inline void bind_attention(pybind11::module_& m) {
  namespace py = pybind11;
  // All that stays the same from call to call; llmkern/attention/compiled/ makes one for each plan.
  py::class_<AttentionParams>(m, "AttentionParams")
      .def(py::init([](const std::vector<int64_t>& sizes, float scale, bool uniform_empty_rows, bool bottom_right,
                       int dtype) {
             AttentionParams p{};
             p.batch = sizes.at(0), p.heads = sizes.at(1), p.kv_heads = sizes.at(2), p.queries = sizes.at(3);
             p.keys = sizes.at(4), p.width = sizes.at(5), p.value_width = sizes.at(6);
             p.scale = scale, p.uniform_empty_rows = uniform_empty_rows, p.dtype = static_cast<DType>(dtype);
             p.mask.left = p.mask.right = kUnbounded, p.mask.bottom_right = bottom_right;
             return p;
           }),
           py::arg("sizes"), py::arg("scale"), py::arg("uniform_empty_rows"), py::arg("bottom_right"), py::arg("dtype"))
      .def("mask",
           [](AttentionParams& p, int dtype, const std::vector<int64_t>& strides) {
             p.mask.dtype = static_cast<DType>(dtype);
             p.mask.b = strides.at(0), p.mask.h = strides.at(1), p.mask.row = strides.at(2), p.mask.key = strides.at(3);
           })
      .def("window",
           [](AttentionParams& p, int64_t left, int64_t right) {  // negative: that side is open
             p.mask.left = left < 0 ? kUnbounded : left, p.mask.right = right < 0 ? kUnbounded : right;
           })
      .def("softcap", [](AttentionParams& p, float softcap) { p.softcap = softcap; })
      .def("alibi", [](AttentionParams& p, int64_t b, int64_t h) { p.alibi_b = b, p.alibi_h = h; })
      .def("dropout", [](AttentionParams& p, uint32_t drop_below,
                         float keep_scale) { p.drop_below = drop_below, p.keep_scale = keep_scale; })
      .def(
          "lengths",
          [](AttentionParams& p, bool is_64, int64_t step, int64_t more) {
            p.mask.lengths_64 = is_64, p.mask.lengths_step = step, p.mask.lengths_more = more;
          },
          py::arg("is_64"), py::arg("step"), py::arg("more") = 0)
      // Sequences end to end: the bounds' dtypes and how many tokens there are. The sizes given are the longest
      // sequences that the caller promises, or -1.
      .def("bounds",
           [](AttentionParams& p, bool queries_64, int64_t queries, bool keys_64, int64_t keys) {
             p.query_bounds = {nullptr, queries_64, queries}, p.key_bounds = {nullptr, keys_64, keys};
           })
      .def("pages", [](AttentionParams& p, bool is_64, int64_t step, int64_t size,
                       int64_t count) { p.pages = {nullptr, is_64, step, size, count}; })
      .def("scales",
           [](AttentionParams& p, const std::vector<int64_t>& keys, const std::vector<int64_t>& values) {
             p.key_scales = {nullptr, keys.at(0), keys.at(1), keys.at(2)};
             p.value_scales = {nullptr, values.at(0), values.at(1), values.at(2)};
           })
#define LLMKERN_STRIDES(name) \
  .def(#name, [](AttentionParams& p, int64_t b, int64_t h, int64_t row) { p.name = {nullptr, b, h, row}; })
          LLMKERN_STRIDES(query) LLMKERN_STRIDES(key) LLMKERN_STRIDES(value) LLMKERN_STRIDES(output)
              LLMKERN_STRIDES(grad_output) LLMKERN_STRIDES(dquery) LLMKERN_STRIDES(dkey) LLMKERN_STRIDES(dvalue)
                  LLMKERN_STRIDES(weights);
#undef LLMKERN_STRIDES
  // Tensors (None: none): those of the rules (kRuleTensors), then those listed here.
  using P = AttentionParams;
  define_attention<attention_forward, &P::query, &P::key, &P::value, &P::output>(m, "attention_forward");
  define_attention<attention_weights, &P::query, &P::key, &P::weights>(m, "attention_weights");
  // Before those: the gradient of the log-sum-exp, that of the scores, the sums of the rows (fill_backward).
  define_backward<attention_backward, &P::query, &P::key, &P::value, &P::output, &P::grad_output, &P::dquery, &P::dkey,
                  &P::dvalue>(m, "attention_backward");
  define_backward<attention_weights_backward, &P::query, &P::key, &P::weights, &P::dquery, &P::dkey>(
      m, "attention_weights_backward");
  // Before the rules: the bounds of the queries and of the keys.
  define_varlen<attention_forward, &P::query, &P::key, &P::value, &P::output>(m, "attention_varlen");
  define_varlen_backward<attention_backward, &P::query, &P::key, &P::value, &P::output, &P::grad_output, &P::dquery,
                         &P::dkey, &P::dvalue>(m, "attention_varlen_backward");
  // Before the rules: the sums, (B, H, Sk).
  call::define_kernel<AttentionParams, 1 + kRuleTensors + 2, fill_column_sums, attention_weights>(
      m, "attention_column_sums");
  // Before the rules: the table of pages, the scales of the keys and of the values.
  call::define_kernel<AttentionParams, 3 + kRuleTensors + 4, fill_cached, attention_forward>(m, "attention_cached");

  // Sizes (B, H, Hkv, Sq, Sn, capacity, D, Dv); dtypes of the tensors and the tables of angles; whether queries are
  // rotated to places of their own.
  py::class_<CacheParams>(m, "CacheParams")
      .def(py::init([](const std::vector<int64_t>& sizes, int dtype, int table_dtype, bool ordered) {
        CacheParams p{};
        p.batch = sizes.at(0), p.heads = sizes.at(1), p.kv_heads = sizes.at(2), p.queries = sizes.at(3);
        p.added = sizes.at(4), p.capacity = sizes.at(5), p.width = sizes.at(6), p.value_width = sizes.at(7);
        p.dtype = static_cast<DType>(dtype), p.rotation.dtype = static_cast<DType>(table_dtype), p.ordered = ordered;
        return p;
      }))
      .def("lengths", [](CacheParams& p, bool is_64, int64_t step) { p.lengths = {nullptr, is_64, step}; })
      .def("pages", [](CacheParams& p, bool is_64, int64_t step, int64_t size,
                       int64_t count) { p.pages = {nullptr, is_64, step, size, count}; })
      .def("scales",
           [](CacheParams& p, const std::vector<int64_t>& keys, const std::vector<int64_t>& values) {
             for (size_t i = 0; i < 3; i++) p.key_scale_steps[i] = keys.at(i), p.value_scale_steps[i] = values.at(i);
           })
      .def("rotation",
           [](CacheParams& p, int64_t length, int64_t rotated, int64_t cos_step, int64_t sin_step, bool interleaved) {
             p.rotation.length = length, p.rotation.rotated = rotated, p.rotation.interleaved = interleaved;
             p.rotation.cos_step = cos_step, p.rotation.sin_step = sin_step;
           })
#define LLMKERN_STRIDES(name) \
  .def(#name, [](CacheParams& p, int64_t b, int64_t h, int64_t row) { p.name = {nullptr, b, h, row}; })
          LLMKERN_STRIDES(query) LLMKERN_STRIDES(rotated) LLMKERN_STRIDES(key) LLMKERN_STRIDES(value)
              LLMKERN_STRIDES(key_cache) LLMKERN_STRIDES(value_cache);
#undef LLMKERN_STRIDES
  // Tensors: the lengths, the table of pages, the scales of keys and of values, cos, sin, then those listed here.
  call::define_kernel<CacheParams, 12, fill_append, cache_append>(m, "cache_append");
}

}  // namespace llmkern
