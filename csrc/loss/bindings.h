// The losses as Python functions; included by register.cpp alone.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "../common/dispatch.h"
#include "../common/pages.h"
#include "layout.h"
#include "params.h"

namespace llmkern {

LLMKERN_KERNEL(cross_entropy, CrossEntropyParams)
LLMKERN_KERNEL(cross_entropy_backward, CrossEntropyBackwardParams)
LLMKERN_KERNEL(distillation, DistillationParams)
LLMKERN_KERNEL(distillation_backward, DistillationBackwardParams)
LLMKERN_KERNEL(linear_cross_entropy, LinearCrossEntropyParams)
LLMKERN_KERNEL(linear_distillation, LinearDistillationParams)

// A tensor's address, of whatever type its parameter is.
struct LossAddress {
  uintptr_t address;
  template <class T>
  operator T*() const {
    return reinterpret_cast<T*>(address);
  }
};

// Of the float32 gradient of a head's weight, which is new; sizes: rows, vocabulary; head: width.
template <class Sizes, class Head>
size_t weight_bytes(const Sizes& sizes, const Head& head) {
  return 4 * static_cast<size_t>(sizes[1]) * static_cast<size_t>(head[0]);
}

inline void bind_loss(pybind11::module_& m) {
  namespace py = pybind11;
  using At = LossAddress;
  // addresses: logits, targets, loss, lse; sizes: rows, vocabulary, stride; rule: label smoothing, z-loss.
  m.def(
      "cross_entropy",
      [](const std::array<uintptr_t, 4>& a, const std::array<int64_t, 3>& sizes, int64_t ignore_index,
         const std::array<float, 2>& rule, int dtype, int threads) {
        cross_entropy({At{a[0]},
                       At{a[1]},
                       At{a[2]},
                       At{a[3]},
                       sizes[0],
                       sizes[1],
                       sizes[2],
                       {ignore_index, rule[0], rule[1]},
                       static_cast<DType>(dtype),
                       threads});
      },
      py::call_guard<py::gil_scoped_release>());
  // addresses: grad, logits, targets, lse, out; the rest as above.
  m.def(
      "cross_entropy_backward",
      [](const std::array<uintptr_t, 5>& a, const std::array<int64_t, 3>& sizes, int64_t ignore_index,
         const std::array<float, 2>& rule, int dtype, int threads) {
        cross_entropy_backward({At{a[0]},
                                At{a[1]},
                                At{a[2]},
                                At{a[3]},
                                At{a[4]},
                                sizes[0],
                                sizes[1],
                                sizes[2],
                                {ignore_index, rule[0], rule[1]},
                                static_cast<DType>(dtype),
                                threads});
      },
      py::call_guard<py::gil_scoped_release>());
  // addresses: student, teacher, targets, soft, hard, stats; sizes: rows, vocabulary, strides of student and teacher.
  m.def(
      "distillation",
      [](const std::array<uintptr_t, 6>& a, const std::array<int64_t, 4>& sizes, float temperature,
         int64_t ignore_index, int dtype, int threads) {
        distillation({At{a[0]}, At{a[1]}, At{a[2]}, At{a[3]}, At{a[4]}, At{a[5]}, sizes[0], sizes[1], sizes[2],
                      sizes[3], temperature, ignore_index, static_cast<DType>(dtype), threads});
      },
      py::call_guard<py::gil_scoped_release>());
  // addresses: grad_soft, grad_hard, student, teacher, targets, stats, soft, student_out, teacher_out.
  m.def(
      "distillation_backward",
      [](const std::array<uintptr_t, 9>& a, const std::array<int64_t, 4>& sizes, float temperature,
         int64_t ignore_index, int dtype, int threads) {
        distillation_backward({At{a[0]}, At{a[1]}, At{a[2]}, At{a[3]}, At{a[4]}, At{a[5]}, At{a[6]}, At{a[7]}, At{a[8]},
                               sizes[0], sizes[1], sizes[2], sizes[3], temperature, ignore_index,
                               static_cast<DType>(dtype), threads});
      },
      py::call_guard<py::gil_scoped_release>());
  // addresses: hidden, weight, bias, their gradients, targets, upstream, loss, lse, work; sizes: rows, vocabulary;
  // head: width, strides of hidden and weight.
  m.def(
      "linear_cross_entropy",
      [](const std::array<uintptr_t, 11>& a, const std::array<int64_t, 2>& sizes, const std::array<int64_t, 3>& head,
         int64_t ignore_index, const std::array<float, 2>& rule, bool backward, bool wide, int dtype, int threads) {
        ask_for_large_pages(At{a[4]}, weight_bytes(sizes, head));
        linear_cross_entropy({{At{a[0]}, At{a[1]}, At{a[2]}, head[0], head[1], head[2]},
                              {At{a[3]}, At{a[4]}, At{a[5]}, wide},
                              At{a[6]},
                              At{a[7]},
                              At{a[8]},
                              At{a[10]},
                              At{a[9]},
                              sizes[0],
                              sizes[1],
                              {ignore_index, rule[0], rule[1]},
                              backward,
                              static_cast<DType>(dtype),
                              threads});
      },
      py::call_guard<py::gil_scoped_release>());
  // addresses: hidden, weight, bias of student and teacher, the student's gradients, targets, soft, hard, work; sizes:
  // rows, vocabulary, chunk; heads as above; factors: temperature, of soft, of hard.
  m.def(
      "linear_distillation",
      [](const std::array<uintptr_t, 13>& a, const std::array<int64_t, 3>& sizes,
         const std::array<std::array<int64_t, 3>, 2>& heads, const std::array<float, 3>& factors, int64_t ignore_index,
         bool wide, int dtype, int threads) {
        ask_for_large_pages(At{a[7]}, weight_bytes(sizes, heads[0]));
        linear_distillation({{At{a[0]}, At{a[1]}, At{a[2]}, heads[0][0], heads[0][1], heads[0][2]},
                             {At{a[3]}, At{a[4]}, At{a[5]}, heads[1][0], heads[1][1], heads[1][2]},
                             {At{a[6]}, At{a[7]}, At{a[8]}, wide},
                             At{a[9]},
                             At{a[10]},
                             At{a[11]},
                             At{a[12]},
                             sizes[0],
                             sizes[1],
                             sizes[2],
                             factors[0],
                             factors[1],
                             factors[2],
                             ignore_index,
                             static_cast<DType>(dtype),
                             threads});
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "linear_cross_entropy_units",
      [](int64_t width, int64_t vocabulary, const std::array<bool, 3>& wanted, bool backward, int dtype) {
        const LinearPlan plan = linear_plan(wanted[0], wanted[1], wanted[2], backward, static_cast<DType>(dtype));
        return linear_cross_entropy_units(width, vocabulary, plan);
      },
      "The floats of work that it needs.");
  m.def(
      "linear_distillation_units",
      [](int64_t width, int64_t teacher_width, int64_t vocabulary, int64_t chunk, bool hidden, bool weight, bool any) {
        return linear_distillation_units(width, teacher_width, vocabulary, chunk, hidden, weight, any);
      },
      "The floats of work that it needs.");
}

}  // namespace llmkern
