// Calls attention_forward_sm90 with parameters that a test gives as plain numbers.
#include <exception>
#include <string>

#include "../../../csrc/attention/cuda_sm90.h"

using namespace llmkern;

extern "C" const char* attention_sm90(const int64_t* n, float scale, bool launch) {
  static std::string said;
  AttentionParams p = {};
  auto next = [&n] { return *n++; };
  auto pointer = [&next] { return reinterpret_cast<char*>(next()); };
  for (AttentionTensor* x : {&p.query, &p.key, &p.value, &p.output})
    x->data = pointer(), x->b = next(), x->h = next(), x->row = next();
  for (int64_t* x : {&p.batch, &p.heads, &p.kv_heads, &p.queries, &p.keys, &p.width, &p.value_width}) *x = next();
  p.dtype = static_cast<DType>(next());
  p.logsumexp = reinterpret_cast<double*>(pointer());
  p.mask.lengths = pointer(), p.mask.lengths_64 = next() != 0;
  p.mask.lengths_step = next(), p.mask.lengths_more = next();
  p.mask.left = next(), p.mask.right = next(), p.mask.bottom_right = next() != 0;
  p.uniform_empty_rows = next() != 0;
  p.mask.data = pointer();
  p.scale = scale;
  if (!launch) return attention_forward_sm90_unsupported(p);
  try {
    attention_forward_sm90(p, 0, nullptr);
    return nullptr;
  } catch (const std::exception& error) {
    said = error.what();
    return said.c_str();
  }
}
