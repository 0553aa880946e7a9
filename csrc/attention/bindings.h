// The attention kernels as Python functions; included by register.cpp alone.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "../common/call.h"
#include "../common/dispatch.h"
#include "params.h"

namespace llmkern {

LLMKERN_KERNEL(attention_forward, AttentionParams)
LLMKERN_KERNEL(attention_backward, AttentionParams)
LLMKERN_KERNEL(attention_weights, AttentionParams)
LLMKERN_KERNEL(attention_weights_backward, AttentionParams)

template <AttentionTensor AttentionParams::*... kTensors>
void fill_attention(AttentionParams& p, void* const* addresses) {
  p.mask.data = static_cast<const char*>(addresses[0]);
  p.mask.lengths = static_cast<const char*>(addresses[1]);
  p.logsumexp = static_cast<double*>(addresses[2]);
  p.grad_scores = static_cast<float*>(addresses[3]);
  p.alibi = static_cast<const float*>(addresses[4]);
  p.sink = static_cast<const float*>(addresses[5]);
  p.seed = static_cast<const int64_t*>(addresses[6]);
  int i = 7;
  (((p.*kTensors).data = static_cast<char*>(addresses[i++])), ...);
}

template <void (*kRun)(const AttentionParams&), AttentionTensor AttentionParams::*... kTensors>
void define_attention(pybind11::module_& m, const char* name) {
  call::define_kernel<AttentionParams, 7 + sizeof...(kTensors), fill_attention<kTensors...>, kRun>(m, name);
}

inline void bind_attention(pybind11::module_& m) {
  namespace py = pybind11;
  // All that stays the same from call to call; llmkern/attention/compiled.py makes one for each plan.
  py::class_<AttentionParams>(m, "AttentionParams")
      .def(py::init([](const std::vector<int64_t>& sizes, float scale, bool uniform_empty_rows, bool causal,
                       bool bottom_right, int dtype) {
             AttentionParams p{};
             p.batch = sizes.at(0), p.heads = sizes.at(1), p.kv_heads = sizes.at(2), p.queries = sizes.at(3);
             p.keys = sizes.at(4), p.width = sizes.at(5), p.value_width = sizes.at(6);
             p.scale = scale, p.uniform_empty_rows = uniform_empty_rows, p.dtype = static_cast<DType>(dtype);
             p.mask.left = kUnbounded, p.mask.right = causal ? 0 : kUnbounded, p.mask.bottom_right = bottom_right;
             return p;
           }),
           py::arg("sizes"), py::arg("scale"), py::arg("uniform_empty_rows"), py::arg("causal"),
           py::arg("bottom_right"), py::arg("dtype"))
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
      .def("lengths",
           [](AttentionParams& p, bool is_64, int64_t step) {
             p.mask.lengths_64 = is_64;
             p.mask.lengths_step = step;
           })
#define LLMKERN_STRIDES(name) \
  .def(#name, [](AttentionParams& p, int64_t b, int64_t h, int64_t row) { p.name = {nullptr, b, h, row}; })
          LLMKERN_STRIDES(query) LLMKERN_STRIDES(key) LLMKERN_STRIDES(value) LLMKERN_STRIDES(output)
              LLMKERN_STRIDES(grad_output) LLMKERN_STRIDES(dquery) LLMKERN_STRIDES(dkey) LLMKERN_STRIDES(dvalue)
                  LLMKERN_STRIDES(weights);
#undef LLMKERN_STRIDES
  // Tensors (None: none): the mask, the lengths, the log-sum-exp, the gradient of the scores, the slopes of ALiBi, the
  // sink, the seed of the dropout, then those listed here.
  using P = AttentionParams;
  define_attention<attention_forward, &P::query, &P::key, &P::value, &P::output>(m, "attention_forward");
  define_attention<attention_backward, &P::query, &P::key, &P::value, &P::output, &P::grad_output, &P::dquery, &P::dkey,
                   &P::dvalue>(m, "attention_backward");
  define_attention<attention_weights, &P::query, &P::key, &P::weights>(m, "attention_weights");
  define_attention<attention_weights_backward, &P::query, &P::key, &P::weights, &P::dquery, &P::dkey>(
      m, "attention_weights_backward");
}

}  // namespace llmkern
