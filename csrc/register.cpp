// The Python face of the library: every kernel as a function of addresses, sizes and strides.
//
// This is the only file that includes pybind11, and nothing here includes torch: shapes and dtypes
// are checked in llmkern/<family>/op.py, before a tensor's address is taken. One library therefore serves every
// version of torch. Each family lists its functions in csrc/<family>/bindings.h.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "activation/bindings.h"
#include "attention/bindings.h"
#include "common/architectures.h"
#include "common/bindings.h"
#include "common/call.h"
#include "common/dispatch.h"
#include "common/parallel.h"
#include "int8/bindings.h"
#include "layer/bindings.h"
#include "loss/bindings.h"
#include "norm/bindings.h"
#include "positional/bindings.h"
#ifdef LLMKERN_CUDA
#include "attention/bindings_cuda.h"
#include "attention/bindings_cuda_decode.h"
#include "int8/bindings_cuda.h"
#include "positional/bindings_cuda.h"
#endif

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of llmkern, called through llmkern.<family>.op.";
  m.def("built_isas", &llmkern::built_isas, "Instruction sets in this library, best first.");
  m.def("supported_isas", &llmkern::supported_isas, "Those of them that this processor runs, best first.");
  m.def("active_isa", [] { return llmkern::isa_name(llmkern::active_isa()); }, "The one that serves calls.");
  m.def("isa_base", &llmkern::isa_base, py::arg("name"), "The one whose kernels it takes, but for products of bytes.");
  m.def("force_isa", &llmkern::force_isa, py::arg("name"), "Serve calls by this one; '' goes back to the best.");
  m.def("parallel_source", &llmkern::parallel_source, "Where the kernels' threads come from.");
#ifdef LLMKERN_CUDA
  m.attr("cuda_architectures") = llmkern::cuda_architectures = LLMKERN_CUDA;
  m.attr("cuda_missing") = "";
  llmkern::bind_attention_cuda(m);
  llmkern::bind_int8_cuda(m);
  llmkern::bind_attention_cuda_decode(m);
  llmkern::bind_positional_cuda(m);
#else
  m.attr("cuda_architectures") = "";
  m.attr("cuda_missing") = LLMKERN_CUDA_MISSING;
#endif
  llmkern::call::bind(m);
  llmkern::bind_common(m);
  llmkern::bind_activation(m);
  llmkern::bind_attention(m);
  llmkern::bind_int8(m);
  llmkern::bind_loss(m);
  llmkern::bind_norm(m);
  llmkern::bind_positional(m);
  llmkern::bind_layer(m);
}
