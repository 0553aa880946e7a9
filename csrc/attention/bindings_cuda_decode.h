// The attention on a cache for CUDA as Python functions; included where the library has a CUDA part. They take tensors
// as those of bindings.h do, and after the plan the device's index and the address of a cudaStream_t, 0 for the default
// one. The values of lengths, tables and positions are not looked at: they lie on the device.
#pragma once
#include "../common/call.h"
#include "cuda_cache.h"
#include "cuda_decode.h"

namespace llmkern {

// kernel(plan, device, stream, number, ..., tensor or None, ...): kCall(params, numbers, addresses, device, stream).
template <class Params, int kNumbers, int kTensors, void (*kCall)(Params&, const int64_t*, void* const*, int, void*)>
PyObject* cuda_kernel(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 3 + kNumbers + kTensors) {
    PyErr_Format(PyExc_TypeError, "expected a plan, device, stream, %d numbers and %d tensors, got %zd arguments",
                 kNumbers, kTensors, count);
    return nullptr;
  }
  int64_t numbers[2 + kNumbers];
  void* addresses[kTensors];
  for (int i = 0; i < 2 + kNumbers; i++) numbers[i] = PyLong_AsLongLong(args[1 + i]);
  if (PyErr_Occurred()) return nullptr;
  for (int i = 0; i < kTensors; i++)
    if (!call::address(args[3 + kNumbers + i], addresses + i)) return nullptr;
  try {
    Params params = pybind11::handle(args[0]).cast<const Params&>();
    pybind11::gil_scoped_release released;  // a full queue of launches must not stop other threads
    kCall(params, numbers + 2, addresses, static_cast<int>(numbers[0]), reinterpret_cast<void*>(numbers[1]));
  } catch (...) {
    return call::raise();
  }
  Py_RETURN_NONE;
}

template <class Params, int kNumbers, int kTensors, void (*kCall)(Params&, const int64_t*, void* const*, int, void*)>
void define_cuda_kernel(pybind11::module_& m, const char* name) {
  static PyMethodDef definition;
  call::define(m, definition, name, cuda_kernel<Params, kNumbers, kTensors, kCall>,
               "A CUDA kernel: (plan, device, stream, number, ..., tensor or None, ...).");
}

inline void call_attention_decode(AttentionParams& p, const int64_t* numbers, void* const* addresses, int device,
                                  void* stream) {
  p.pages.table = static_cast<const char*>(addresses[1]);
  p.key_scales.data = static_cast<const float*>(addresses[2]);
  p.value_scales.data = static_cast<const float*>(addresses[3]);
  p.mask.lengths = static_cast<const char*>(addresses[4]);
  p.logsumexp = static_cast<double*>(addresses[5]);
  p.alibi = static_cast<const float*>(addresses[6]);
  p.sink = static_cast<const float*>(addresses[7]);
  AttentionTensor* tensors[] = {&p.query, &p.key, &p.value, &p.output};
  for (int i = 0; i < 4; i++) tensors[i]->data = static_cast<char*>(addresses[8 + i]);
  attention_decode_cuda(p, static_cast<float*>(addresses[0]), static_cast<int>(numbers[0]), device, stream);
}

inline void call_cache_append(CacheParams& p, const int64_t*, void* const* addresses, int device, void* stream) {
  p.lengths.data = static_cast<const char*>(addresses[0]);
  p.pages.table = static_cast<const char*>(addresses[1]);
  p.key_scales = static_cast<float*>(addresses[2]), p.value_scales = static_cast<float*>(addresses[3]);
  p.rotation.cos = addresses[4], p.rotation.sin = addresses[5];
  AttentionTensor* tensors[] = {&p.query, &p.rotated, &p.key, &p.value, &p.key_cache, &p.value_cache};
  for (int i = 0; i < 6; i++) tensors[i]->data = static_cast<char*>(addresses[6 + i]);
  cache_cuda(p, device, stream);
}

inline void bind_attention_cuda_decode(pybind11::module_& m) {
  // The number of pieces; then the workspace, the table of pages, the scales of keys and of values, the lengths, the
  // log-sum-exp, the slopes, the sink, query, key, value and output.
  define_cuda_kernel<AttentionParams, 1, 12, call_attention_decode>(m, "attention_decode_cuda");
  // As cache_append of bindings.h.
  define_cuda_kernel<CacheParams, 0, 12, call_cache_append>(m, "cache_append_cuda");
}

}  // namespace llmkern
