// The int8 CUDA launchers as a Python module whose launches are noted. The class of the plan is that of llmkern._C.
#include "../../../csrc/int8/bindings_cuda.h"
#include "launches.h"

PYBIND11_MODULE(int8_launches, m) {
  launches::bind(m);
  llmkern::bind_int8_cuda(m);
}
