// The attention kernels as Python functions; included by register.cpp alone.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "../common/dispatch.h"
#include "params.h"

namespace llmkern {

LLMKERN_KERNEL(attention_forward, AttentionParams)

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
          LLMKERN_STRIDES(query) LLMKERN_STRIDES(key) LLMKERN_STRIDES(value) LLMKERN_STRIDES(output);
#undef LLMKERN_STRIDES
  m.def(
      "attention_forward",
      [](const AttentionParams& plan, uintptr_t query, uintptr_t key, uintptr_t value, uintptr_t mask,
         uintptr_t lengths, uintptr_t output, uintptr_t logsumexp, int threads) {
        AttentionParams p = plan;
        p.query.data = reinterpret_cast<char*>(query);
        p.key.data = reinterpret_cast<char*>(key);
        p.value.data = reinterpret_cast<char*>(value);
        p.mask.data = reinterpret_cast<const char*>(mask);
        p.mask.lengths = reinterpret_cast<const char*>(lengths);
        p.output.data = reinterpret_cast<char*>(output);
        p.logsumexp = reinterpret_cast<float*>(logsumexp);
        p.threads = threads;
        attention_forward(p);
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace llmkern
