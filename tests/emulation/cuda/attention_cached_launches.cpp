// The CUDA launchers of the attention on a cache as a Python module whose launches are noted. The classes of the plans
// are those of llmkern._C.
#include "../../../csrc/attention/bindings_cuda_decode.h"
#include "launches.h"

PYBIND11_MODULE(attention_cached_launches, m) {
  launches::bind(m);
  llmkern::bind_attention_cuda_decode(m);
}
