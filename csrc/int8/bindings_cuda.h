// The int8 CUDA kernels as Python functions; included where the library has a CUDA part. The plan is an Int8LinearPlan
// (bindings.h); `stream` is the address of a cudaStream_t, 0 for the default one.
#pragma once
#include <pybind11/pybind11.h>

#include "cuda.h"

namespace llmkern {

inline void bind_int8_cuda(pybind11::module_& m) {
  namespace py = pybind11;
  m.def(
      "int8_workspace_cuda",
      [](const Int8LinearParams& plan) {
        Int8Digits digits{};
        return place_digits(plan, nullptr, digits);
      },
      "How many bytes of memory, aligned to 16, int8_linear_cuda works in.");
  m.def("int8_sm90_unsupported", int8_tiles_sm90_unsupported,
        "Why the tiles for Hopper cannot serve a call, in a sentence; None where they can.");
  m.def(
      "int8_linear_cuda",
      [](const Int8LinearParams& plan, uintptr_t x, uintptr_t weight, int64_t weight_stride, uintptr_t weight_sums,
         uintptr_t weight_scale, int64_t scale_stride_n, int64_t scale_stride_g, uintptr_t bias, uintptr_t residual,
         uintptr_t given, uintptr_t out, uintptr_t workspace, int device, uintptr_t stream, bool sm90, int tile_rows,
         int tile_columns) {
        Int8CudaParams p{};
        p.linear = plan;
        p.linear.x = reinterpret_cast<const void*>(x);
        p.linear.weight_scale = reinterpret_cast<const float*>(weight_scale);
        p.linear.bias = reinterpret_cast<const void*>(bias);
        p.linear.residual = reinterpret_cast<const void*>(residual);
        p.linear.quantize.given = reinterpret_cast<const float*>(given);
        p.linear.out = reinterpret_cast<void*>(out);
        p.weight = reinterpret_cast<const int8_t*>(weight), p.weight_stride = weight_stride;
        p.weight_sums = reinterpret_cast<const int32_t*>(weight_sums);
        p.weight_scale_stride[0] = scale_stride_n, p.weight_scale_stride[1] = scale_stride_g;
        p.pairs = takes_pairs(plan.activation), p.sm90 = sm90;
        p.tile_rows = tile_rows, p.tile_columns = tile_columns;
        place_digits(plan, reinterpret_cast<void*>(workspace), p.digits);
        int8_linear_cuda(p, device, reinterpret_cast<void*>(stream));
      },
      py::call_guard<py::gil_scoped_release>(), py::arg("plan"), py::arg("x"), py::arg("weight"),
      py::arg("weight_stride"), py::arg("weight_sums"), py::arg("weight_scale"), py::arg("scale_stride_n"),
      py::arg("scale_stride_g"), py::arg("bias"), py::arg("residual"), py::arg("input_scale"), py::arg("out"),
      py::arg("workspace"), py::arg("device"), py::arg("stream"), py::arg("sm90"), py::arg("tile_rows") = 0,
      py::arg("tile_columns") = 0);
}

}  // namespace llmkern
