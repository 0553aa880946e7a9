// The attention CUDA kernels as Python functions; included where the library has a CUDA part.
#pragma once
#include "bindings.h"
#include "cuda_sm90.h"

namespace llmkern {

// A kernel as kernel(plan, device, stream, tensor or None, ...): `stream` is the address of a cudaStream_t, 0 for the
// default one. What kFill does, call.h says of `kernel`.
template <class Params, int kTensors, void (*kFill)(Params&, void* const*), void (*kRun)(const Params&, int, void*)>
PyObject* cuda_kernel(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != kTensors + 3) {
    PyErr_Format(PyExc_TypeError, "expected a plan, device, stream and %d tensors, got %zd arguments", kTensors, count);
    return nullptr;
  }
  void* addresses[kTensors];
  for (int i = 0; i < kTensors; i++)
    if (!call::address(args[i + 3], addresses + i)) return nullptr;
  try {
    Params params = pybind11::handle(args[0]).cast<const Params&>();
    int device = static_cast<int>(PyLong_AsLong(args[1]));
    void* stream = PyLong_AsVoidPtr(args[2]);
    if (PyErr_Occurred()) return nullptr;
    kFill(params, addresses);
    pybind11::gil_scoped_release released;
    kRun(params, device, stream);
  } catch (...) {
    return call::raise();
  }
  Py_RETURN_NONE;
}

template <class Params, int kTensors, void (*kFill)(Params&, void* const*), void (*kRun)(const Params&, int, void*)>
void define_cuda_kernel(pybind11::module_& m, const char* name) {
  static PyMethodDef definition;
  call::define(m, definition, name, cuda_kernel<Params, kTensors, kFill, kRun>,
               "A CUDA kernel: (plan, device, stream, tensor or None, ...).");
}

inline void bind_attention_cuda(pybind11::module_& m) {
  using P = AttentionParams;
  constexpr int kTensors = kRuleTensors + 4;
  constexpr auto fill = fill_attention<&P::query, &P::key, &P::value, &P::output>;
  define_cuda_kernel<AttentionParams, kTensors, fill, attention_forward_cuda>(m, "attention_forward_cuda");
  define_cuda_kernel<AttentionParams, kTensors, fill, attention_forward_hopper>(m, "attention_forward_hopper");
  // Why wgmma and TMA cannot serve calls with this plan on Hopper, or None where they can; a call whose tensors do not
  // begin at multiples of 16 bytes is served by mma.sync all the same.
  m.def("attention_forward_sm90_unsupported", attention_forward_sm90_unsupported);
}

}  // namespace llmkern
