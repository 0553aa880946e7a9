// Arguments of the loss kernels. Strides count elements from row to row; rows themselves are contiguous. Losses are
// float32, log-sum-exps double, put together and taken apart in row.h. A row whose target is `ignore_index` has loss 0,
// log-sum-exp 0 and no gradient; a target outside of [0, vocabulary) otherwise, which the operators refuse, makes NaN
// and touches no memory.
#pragma once
#include <cstdint>

#include "../common/types.h"

namespace llmkern {

// loss = lse - (1 - smoothing) x_target - smoothing mean(x) + z_loss lse^2, with lse = log(sum(exp(x))).
struct LossRule {
  int64_t ignore_index;
  float smoothing, z_loss;
};

// (rows, vocabulary) logits; loss and lse: (rows,).
struct CrossEntropyParams {
  const void* logits;
  const int64_t* targets;
  float* loss;
  double* lse;
  int64_t rows, vocabulary, stride;
  LossRule rule;
  DType dtype;
  int threads;
};

// grad: (rows,), of the loss. out: (rows, vocabulary), contiguous, in the logits' dtype.
struct CrossEntropyBackwardParams {
  const float* grad;
  const void* logits;
  const int64_t* targets;
  const double* lse;
  void* out;
  int64_t rows, vocabulary, stride;
  LossRule rule;
  DType dtype;
  int threads;
};

// soft = KL(softmax(teacher / T) || softmax(student / T)), hard = cross-entropy of the student; stats: (rows, 3), the
// log-sum-exps of student / T, student, teacher / T.
struct DistillationParams {
  const void *student, *teacher;
  const int64_t* targets;
  float *soft, *hard;
  double* stats;
  int64_t rows, vocabulary, student_stride, teacher_stride;
  float temperature;
  int64_t ignore_index;
  DType dtype;
  int threads;
};

// The gradients for those of soft and hard; student_out and teacher_out are contiguous, either may be null.
struct DistillationBackwardParams {
  const float *grad_soft, *grad_hard;
  const void *student, *teacher;
  const int64_t* targets;
  const double* stats;
  const float* soft;
  void *student_out, *teacher_out;
  int64_t rows, vocabulary, student_stride, teacher_stride;
  float temperature;
  int64_t ignore_index;
  DType dtype;
  int threads;
};

// logits = hidden weight^T + bias: hidden (rows, width), weight (vocabulary, width), bias (vocabulary) or null.
struct LinearHead {
  const void *hidden, *weight, *bias;
  int64_t width, hidden_stride, weight_stride;
};

// The gradients of a head: hidden (rows, width) contiguous in float32 where `wide`, else in the head's dtype; weight
// (vocabulary, width) and bias (vocabulary) contiguous float32 whatever the dtype. Each may be null.
struct LinearHeadGradients {
  void* hidden;
  float *weight, *bias;
  bool wide;
};

// The cross-entropy of the logits of a head, which are never whole in memory. upstream: (rows,), the gradient of each
// loss; null where no gradients are asked for. lse is written, or given where `backward`: then loss is not computed.
// work: as many floats as linear_cross_entropy_units says.
struct LinearCrossEntropyParams {
  LinearHead head;
  LinearHeadGradients grads;
  const int64_t* targets;
  const float* upstream;
  float *loss, *work;
  double* lse;
  int64_t rows, vocabulary;
  LossRule rule;
  bool backward;
  DType dtype;
  int threads;
};

// Both losses of DistillationParams, of the logits of two heads, `chunk` rows at a time (a multiple of 16); the
// student's gradients for an upstream gradient of `soft_factor` for each soft and `hard_factor` for each hard that is
// not ignored. work: as many floats as linear_distillation_units says.
struct LinearDistillationParams {
  LinearHead student, teacher;
  LinearHeadGradients grads;
  const int64_t* targets;
  float *soft, *hard, *work;
  int64_t rows, vocabulary, chunk;
  float temperature, soft_factor, hard_factor;
  int64_t ignore_index;
  DType dtype;
  int threads;
};

}  // namespace llmkern
