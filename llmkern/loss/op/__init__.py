"""The operators of this family: cross_entropy and distillation of logits, and of hidden states."""

from llmkern.loss.op.cross_entropy import cross_entropy
from llmkern.loss.op.distillation import distillation
from llmkern.loss.op.linear import linear_cross_entropy
from llmkern.loss.op.linear_distillation import linear_distillation

__all__ = ["cross_entropy", "distillation", "linear_cross_entropy", "linear_distillation"]
