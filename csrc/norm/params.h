// Arguments of the normalisation kernels. Strides count elements from row to row; rows themselves are contiguous.
#pragma once
#include <cstdint>

#include "../common/types.h"

namespace llmkern {

// total = x + residual, rounded to the dtype (x itself where residual is null), and with the mean and the variance of
// a row of it
//   out = (total - mean) / sqrt(variance + eps) * (offset + weight) + bias   where centred,
//   out = total / sqrt(mean of total^2 + eps) * (offset + weight) + bias     elsewhere.
// A null weight stands for 1 - offset, a null bias for 0. out and total are contiguous; total may be null where
// residual is. statistics: (rows, 2), the mean (0 where not centred) and the reciprocal of the root.
struct NormParams {
  const void *x, *residual, *weight, *bias;
  void *out, *total;
  float* statistics;
  int64_t rows, width;
  int64_t x_stride, residual_stride;
  float eps, offset;
  bool centred;
  DType dtype, weight_dtype;
  int threads;
};

// The gradients of the same: grad that of out, grad_total that of total (may be null). dx is contiguous. The rows are
// cut into `chunks` of `chunk_rows`; each has a row (width) of weight_sums and bias_sums (chunks, width) of its own,
// which the caller adds up; either may be null.
struct NormBackwardParams {
  const void *grad, *grad_total, *total, *weight;
  const float* statistics;
  void* dx;
  float *weight_sums, *bias_sums;
  int64_t rows, width, chunks, chunk_rows;
  int64_t grad_stride, grad_total_stride, total_stride;
  float offset;
  bool centred;
  DType dtype, weight_dtype;
  int threads;
};

}  // namespace llmkern
