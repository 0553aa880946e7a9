// The CUDA kernels, compiled for the host by the tests, as a Python module: the same functions that llmkern._C has
// where it was built with nvcc. The classes of their arguments are those of llmkern._C.
#include <pybind11/stl.h>

#include <utility>

#include "../../../csrc/common/architectures.h"
#include "../../../csrc/positional/bindings_cuda.h"
#include "cuda_runtime.h"

PYBIND11_MODULE(emulated_cuda, m) {
  llmkern::bind_positional_cuda(m);
  m.def("runtime", [](int launch_fails, int driver, int toolkit, int devices, int major, int minor, const char* built) {
    emulation::runtime = {static_cast<cudaError_t>(launch_fails), driver, toolkit, devices, major, minor, {}};
    static std::string architectures;
    architectures = built;
    llmkern::cuda_architectures = architectures.c_str();
  });
  m.def("calls", [] { return std::exchange(emulation::runtime.calls, {}); });
}
