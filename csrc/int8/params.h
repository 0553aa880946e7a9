// Arguments of the int8 kernels. Strides count elements; the last dimension of every matrix is contiguous.
#pragma once
#include <cstdint>

#include "../common/types.h"

namespace llmkern {

// How an activation x becomes an integer u = round(x / scale) + zero. llmkern/int8/scheme.py holds these numbers.
enum class Scaling : int32_t {
  row = 0,        // scale and zero for each row, so that 0..255 span it
  symmetric = 1,  // scale for each row, zero = 128, so that 1..255 span it
  given = 2,      // both given, for all rows
  wide = 3,       // scale for each row, zero = 128, so that two digits of 8 bits span it
};
// Behind the sum of a linear layer. The last two take pairs of outputs: f(first half of the weight) * second half.
enum class Activation : int32_t { none = 0, relu = 1, gelu = 2, gelu_tanh = 3, silu = 4, swiglu = 5, geglu = 6 };
inline bool takes_pairs(Activation a) { return a == Activation::swiglu || a == Activation::geglu; }

// Weights in the order that int8_linear of the same instruction set reads; csrc/int8/packed.h describes it.
struct Int8PackParams {
  const int8_t* weight;  // (outputs, depth)
  void* packed;          // 64-byte aligned; with null only `bytes` is set
  int64_t outputs, depth;
  int64_t group;  // values of k whose sums are needed by themselves; 0: all
  bool pairs;
  int threads;
  int64_t* bytes;  // out: how much memory `packed` takes
};

struct QuantizeParams {
  Scaling scaling;
  bool outliers;       // what lies far outside a row's usual range keeps its value, in a second digit
  int64_t group;       // a scale and zero for each `group` values of k (row or symmetric, no outliers); 0: one
  int64_t rotate;      // size of the Hadamard transform before; 1: none
  const float* given;  // Scaling::given: scale, zero
};

// out[m, n] = f(sum over k of (u[m, k] - zero[m]) * weight[n, k] * scale[m] * weight_scale[n] + bias[n]) + residual[m,
// n]
struct Int8LinearParams {
  const void* x;  // (rows, depth)
  const void* packed;
  const float* weight_scale;  // (outputs), or (groups, outputs)
  const void* bias;           // (outputs) or null
  const void* residual;       // (rows, outputs) in x's dtype, of pairs (rows, outputs / 2); or null
  void* out;                  // as residual
  int64_t rows, outputs, depth, x_stride, residual_stride, out_stride;
  QuantizeParams quantize;
  Activation activation;
  DType dtype, bias_dtype;
  int threads;
  bool* accepted;  // out: false where `packed` was made for another layout, and is not read
};

// The first half of int8_linear by itself: u - zero is x / scale up to the rounding.
struct QuantizeRowsParams {
  const void* x;     // (rows, depth)
  int32_t* integer;  // (rows, depth)
  float* scale;      // (rows) or (rows, groups); NaN for a row with NaN or infinity
  int32_t* zero;     // as scale
  int64_t rows, depth, x_stride;
  QuantizeParams quantize;
  DType dtype;
};

}  // namespace llmkern
