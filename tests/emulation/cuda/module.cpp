// The CUDA kernels, compiled for the host by the tests, as a Python module: the same functions that llmkern._C has
// where it was built with nvcc. The classes of their arguments are those of llmkern._C.
#include "../../../csrc/positional/bindings_cuda.h"

PYBIND11_MODULE(emulated_cuda, m) { llmkern::bind_positional_cuda(m); }
