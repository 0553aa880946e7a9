"""The plain versions of the modules: torch's own losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss, with z_loss times the square of each row's log-sum-exp (logits (N, C) or (C))."""

    def __init__(self, *args: Any, z_loss: float = 0.0, **options: Any) -> None:
        super().__init__(*args, **options)
        self.z_loss = z_loss

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        loss = super().forward(input, target)
        if not self.z_loss:
            return loss
        counted = target != self.ignore_index
        squares = torch.where(counted, self.z_loss * input.logsumexp(-1).square(), 0.0)
        if self.reduction != "none":
            squares = squares.sum() / (counted.sum() if self.reduction == "mean" else 1)
        return (loss + squares).to(loss.dtype)


class LinearCrossEntropyLoss(nn.Module):
    """The cross-entropy of hidden states (..., D) and a last layer (V, D)."""

    def __init__(
        self, ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0, z_loss: float = 0.0
    ) -> None:
        super().__init__()
        self.loss = CrossEntropyLoss(
            ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing, z_loss=z_loss
        )

    def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
        loss: Tensor = self.loss(F.linear(hidden, weight, bias).flatten(0, -2), targets.flatten())
        return loss.view(targets.shape) if self.loss.reduction == "none" else loss


class DistillationLoss(nn.Module):
    """Hinton et al. 2015, section 2: student_logits, teacher_logits (N, C), true_labels (N,)."""

    def __init__(self, temperature: float = 4.0, alpha: float = 0.3) -> None:
        super().__init__()
        self.temperature, self.alpha = temperature, alpha

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, true_labels: Tensor) -> Tensor:
        return distilled(student_logits, teacher_logits, true_labels, self.temperature, self.alpha)


def distilled(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, alpha: float) -> Tensor:
    log_p = F.log_softmax(student / temperature, dim=1)
    q = F.softmax(teacher / temperature, dim=1)
    soft = F.kl_div(log_p, q, reduction="batchmean") * temperature**2
    return alpha * soft + (1.0 - alpha) * F.cross_entropy(student, labels)


class LinearDistillationLoss(DistillationLoss):
    """The same of both models' hidden states (..., D) and last layers (V, D); the teacher gets no gradient."""

    def forward(  # type: ignore[override]
        self, student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor,
        true_labels: Tensor, student_bias: Tensor | None = None, teacher_bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        student = F.linear(student_hidden, student_weight, student_bias).flatten(0, -2)
        teacher = F.linear(teacher_hidden, teacher_weight, teacher_bias).flatten(0, -2).detach()
        return super().forward(student, teacher, true_labels.flatten())
