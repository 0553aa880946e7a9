"""Losses over a vocabulary: cross-entropy and distillation, of logits or of hidden states before the last layer."""

from llmkern.loss.module import CrossEntropyLoss, DistillationLoss, LinearCrossEntropyLoss, LinearDistillationLoss

__all__ = ["CrossEntropyLoss", "DistillationLoss", "LinearCrossEntropyLoss", "LinearDistillationLoss"]
