// The decoder layer as a Python function; included by register.cpp alone, behind the families that it is made of.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "../attention/bindings.h"
#include "../common/call.h"
#include "../int8/bindings.h"
#include "../norm/bindings.h"
#include "../positional/bindings.h"
#include "decoder.h"

namespace llmkern {

// A tensor's address, and the steps of its dimensions but the last.
inline bool describe(PyObject* x, char** data, int dimensions, int64_t* const* steps) {
  void* address;
  if (!call::address(x, &address)) return false;
  *data = static_cast<char*>(address);
  call::Description d;
  if (!address) return true;
  if (!call::torch().api || call::torch().api->describe(x, &d) != 0 || d.dimensions != dimensions) {
    if (!PyErr_Occurred()) PyErr_Format(PyExc_ValueError, "expected a tensor of %d dimensions", dimensions);
    return false;
  }
  for (int i = 0; i < dimensions; i++)
    if (steps[i]) *steps[i] = d.shape[i] == 1 ? 0 : d.strides[i];
  return true;
}

// decoder_layer(plan, threads, past, x, out, cos, sin, mask, keys, values, the weights of the two norms, and of each
// linear layer the packed weight, its scales and its bias); mask, keys, values and biases may be None.
inline PyObject* decoder_layer(PyObject*, PyObject* const* args, Py_ssize_t count) {
  constexpr int kLinears = 4, kBefore = 12;
  if (count != kBefore + 3 * kLinears) {
    PyErr_Format(PyExc_TypeError, "expected %d arguments, got %zd", kBefore + 3 * kLinears, count);
    return nullptr;
  }
  try {
    DecoderLayerParams p = pybind11::handle(args[0]).cast<const DecoderLayerParams&>();
    p.threads = static_cast<int>(PyLong_AsLong(args[1]));
    p.past = PyLong_AsLongLong(args[2]);
    if (PyErr_Occurred()) return nullptr;
    char *cos, *sin, *mask;
    int64_t sin_batch, sin_row;
    int64_t* const tables[] = {&p.table_batch, &p.table_row, nullptr};
    int64_t* const others[] = {&sin_batch, &sin_row, nullptr};
    int64_t* const of_mask[] = {&p.mask_b, &p.mask_h, &p.mask_row, &p.mask_key};
    int64_t* const of_keys[] = {&p.keys_b, &p.keys_h, &p.keys_row, nullptr};
    int64_t* const of_values[] = {&p.values_b, &p.values_h, &p.values_row, nullptr};
    void *x, *norms[2], *weights[3 * kLinears];
    if (!call::address(args[3], &x) || !call::address(args[4], &p.out) || !describe(args[5], &cos, 3, tables) ||
        !describe(args[6], &sin, 3, others) || !describe(args[7], &mask, 4, of_mask) ||
        !describe(args[8], &p.keys, 4, of_keys) || !describe(args[9], &p.values, 4, of_values))
      return nullptr;
    for (int i = 0; i < 2; i++)
      if (!call::address(args[10 + i], norms + i)) return nullptr;
    for (int i = 0; i < 3 * kLinears; i++)
      if (!call::address(args[kBefore + i], weights + i)) return nullptr;
    if (sin_batch != p.table_batch || sin_row != p.table_row)
      throw std::invalid_argument("decoder_layer: expected cos and sin with the same strides");
    p.x = x, p.cos = cos, p.sin = sin, p.mask = mask, p.attention_norm = norms[0], p.feed_norm = norms[1];
    LayerLinear* const linears[kLinears] = {&p.qkv, &p.output, &p.gate_up, &p.down};
    for (int i = 0; i < kLinears; i++) {
      linears[i]->packed = weights[3 * i], linears[i]->scale = static_cast<const float*>(weights[3 * i + 1]);
      linears[i]->bias = weights[3 * i + 2];
    }
    PyThreadState* state = PyEval_SaveThread();
    try {
      DecoderLayer(p).run();
    } catch (...) {
      PyEval_RestoreThread(state);
      throw;
    }
    PyEval_RestoreThread(state);
  } catch (...) {
    return call::raise();
  }
  Py_RETURN_NONE;
}

inline void bind_layer(pybind11::module_& m) {
  namespace py = pybind11;
  using Linear = std::tuple<int64_t, int64_t, QuantizeParams, int>;  // outputs, depth, inputs, dtype of the bias
  py::class_<DecoderLayerParams>(m, "DecoderLayerPlan")
      .def(py::init([](int64_t batch, int64_t length, int64_t width, int64_t heads, int64_t kv_heads,
                       int64_t head_width, const std::vector<Linear>& linears, int gate, float scale,
                       const std::tuple<float, float>& eps, const std::tuple<float, float>& offset, int dtype) {
             DecoderLayerParams p{};
             p.batch = batch, p.length = length, p.width = width, p.heads = heads, p.kv_heads = kv_heads;
             p.head_width = head_width, p.scale = scale, p.dtype = static_cast<DType>(dtype);
             p.attention_eps = std::get<0>(eps), p.feed_eps = std::get<1>(eps);
             p.attention_offset = std::get<0>(offset), p.feed_offset = std::get<1>(offset);
             p.gate = static_cast<Activation>(gate), p.threads = 1;
             LayerLinear* const made[] = {&p.qkv, &p.output, &p.gate_up, &p.down};
             for (size_t i = 0; i < 4; i++) {
               const auto& [outputs, depth, quantize, bias] = linears.at(i);
               *made[i] = {nullptr, nullptr, nullptr, outputs, depth, quantize, static_cast<DType>(bias)};
             }
             return p;
           }),
           py::kw_only(), py::arg("batch"), py::arg("length"), py::arg("width"), py::arg("heads"), py::arg("kv_heads"),
           py::arg("head_width"), py::arg("linears"), py::arg("gate"), py::arg("scale"), py::arg("eps"),
           py::arg("offset"), py::arg("dtype"));
  static PyMethodDef definition;
  call::define(m, definition, "decoder_layer", decoder_layer, "A decoder layer: (plan, threads, past, tensors...).");
}

}  // namespace llmkern
