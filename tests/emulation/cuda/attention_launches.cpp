// The CUDA launchers of the attention forward as a Python module whose launches are noted. The class of the plan is
// that of llmkern._C.
#include "../../../csrc/attention/bindings_cuda.h"
#include "launches.h"

PYBIND11_MODULE(attention_launches, m) {
  launches::bind(m);
  llmkern::bind_attention_cuda(m);
}
