// The attention kernels as Python functions; included by register.cpp alone.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "../common/dispatch.h"
#include "params.h"

namespace llmkern {

LLMKERN_KERNEL(attention_forward, AttentionParams)
LLMKERN_KERNEL(attention_backward, AttentionParams)
LLMKERN_KERNEL(attention_weights, AttentionParams)
LLMKERN_KERNEL(attention_weights_backward, AttentionParams)

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
             p.mask.causal = causal, p.mask.bottom_right = bottom_right;
             return p;
           }),
           py::arg("sizes"), py::arg("scale"), py::arg("uniform_empty_rows"), py::arg("causal"),
           py::arg("bottom_right"), py::arg("dtype"))
      .def("mask",
           [](AttentionParams& p, int dtype, const std::vector<int64_t>& strides) {
             p.mask.dtype = static_cast<DType>(dtype);
             p.mask.b = strides.at(0), p.mask.h = strides.at(1), p.mask.row = strides.at(2), p.mask.key = strides.at(3);
           })
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
  // A kernel takes a plan, the threads, and addresses (0: none): of the mask, the lengths, the log-sum-exp, the
  // gradient of the scores, then of the tensors listed here.
  using P = AttentionParams;
  using Tensors = std::vector<AttentionTensor P::*>;
  auto define = [&m](const char* name, void (*kernel)(const P&), const Tensors& tensors) {
    m.def(
        name,
        [kernel, tensors](const P& plan, int threads, const std::vector<uintptr_t>& addresses) {
          P p = plan;
          p.threads = threads;
          p.mask.data = reinterpret_cast<const char*>(addresses.at(0));
          p.mask.lengths = reinterpret_cast<const char*>(addresses.at(1));
          p.logsumexp = reinterpret_cast<double*>(addresses.at(2));
          p.grad_scores = reinterpret_cast<float*>(addresses.at(3));
          for (size_t i = 0; i < tensors.size(); i++)
            (p.*tensors[i]).data = reinterpret_cast<char*>(addresses.at(4 + i));
          kernel(p);
        },
        py::call_guard<py::gil_scoped_release>());
  };
  define("attention_forward", attention_forward, {&P::query, &P::key, &P::value, &P::output});
  define("attention_backward", attention_backward,
         {&P::query, &P::key, &P::value, &P::output, &P::grad_output, &P::dquery, &P::dkey, &P::dvalue});
  define("attention_weights", attention_weights, {&P::query, &P::key, &P::weights});
  define("attention_weights_backward", attention_weights_backward,
         {&P::query, &P::key, &P::weights, &P::dquery, &P::dkey});
}

}  // namespace llmkern
