"""The losses as modules: torch's own interface, and that of the plain versions in llmkern.reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmkern import autocast, check
from llmkern.loss import op
from llmkern.loss.op import checks
from llmkern.loss.reference_module import distilled


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss, fused, and with a z-loss: z_loss times the square of each row's log-sum-exp.

    Constructor, forward and results are torch's, with the logits' dtype, float32 under autocast; z_loss by keyword.
    Logits of (N, C) or (C) and targets of class indices run on the kernels; class weights, probabilities as targets
    and torch's (N, C, d1, ...) are torch's own to serve, without a z-loss (ValueError where one is asked for). Logits
    of more dimensions with the classes last are for `llmkern.functional.cross_entropy`.

    Raises what torch.nn.CrossEntropyLoss raises. Source: `llmkern.functional.cross_entropy`.
    """

    def __init__(
        self, weight: Tensor | None = None, size_average: bool | None = None, ignore_index: int = -100,
        reduce: bool | None = None, reduction: str = "mean", label_smoothing: float = 0.0, *, z_loss: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        check.finite("z_loss", z_loss)
        self.z_loss = z_loss

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """input (N, C) or (C), target (N) or (): a number, or target's shape for the reduction "none"."""
        if not self._fits(input, target):
            if self.z_loss:
                raise ValueError(
                    "z_loss: expected floating logits of (N, C) or (C) and classes of (N) or (), int64, without "
                    f"class weights; got {_described(input)} and {_described(target)}"
                )
            return super().forward(input, target)
        loss = op.cross_entropy(
            input, target, ignore_index=self.ignore_index, label_smoothing=self.label_smoothing, z_loss=self.z_loss,
            reduction=self.reduction,
        )  # fmt: skip
        return _as_torch(loss, input)

    def _fits(self, input: Any, target: Any) -> bool:
        """Whether the kernels take the call; torch's own forward raises on what is wrong with it."""
        if not all(isinstance(t, Tensor) and t.layout is torch.strided and not t.is_nested for t in (input, target)):
            return False
        shapes = input.dim() in (1, 2) and target.shape == input.shape[:-1] and input.size(-1) > 0
        floats = check.PLAIN_FLOATS if self.z_loss else check.FLOATS
        dtypes = input.dtype in floats and target.dtype == torch.int64
        others = self.weight is None and self.reduction in checks.REDUCTIONS and 0.0 <= self.label_smoothing <= 1.0
        return bool(shapes and dtypes and others and input.device == target.device)


class LinearCrossEntropyLoss(nn.Module):
    """The cross-entropy of hidden states and a last layer, whose weight is given at each call, as often it is that of
    the embedding: `llmkern.functional.linear_cross_entropy`, which never holds all logits.

    Raises ValueError and TypeError for options as that function does.
    """

    def __init__(
        self, ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0, z_loss: float = 0.0
    ) -> None:
        super().__init__()
        check.integer("ignore_index", ignore_index)
        check.one_of("reduction", reduction, checks.REDUCTIONS)
        checks.options(label_smoothing, z_loss)
        self.ignore_index, self.reduction = ignore_index, reduction
        self.label_smoothing, self.z_loss = label_smoothing, z_loss

    def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
        """hidden (..., D), weight (V, D), targets (...), bias (V,). Returns a number, or targets' shape for the
        reduction "none", in hidden's dtype, float32 under autocast."""
        loss = op.linear_cross_entropy(
            hidden, weight, targets, bias, ignore_index=self.ignore_index, label_smoothing=self.label_smoothing,
            z_loss=self.z_loss, reduction=self.reduction,
        )  # fmt: skip
        return _as_torch(loss, hidden)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}, label_smoothing={self.label_smoothing}, z_loss={self.z_loss}"


class _Distillation(nn.Module):
    def __init__(self, temperature: float = 4.0, alpha: float = 0.3) -> None:
        super().__init__()
        checks.temperature(temperature)
        check.finite("alpha", alpha)
        self.temperature, self.alpha = temperature, alpha

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, alpha={self.alpha}"


class DistillationLoss(_Distillation):
    """alpha T^2 KLDivLoss("batchmean")(log_softmax(student / T), softmax(teacher / T)) + (1 - alpha)
    cross_entropy(student, labels), fused.

    temperature: positive. alpha: the share of the teacher. Raises TypeError and ValueError naming the argument. Source:
    Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2.
    """

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, true_labels: Tensor) -> Tensor:
        """student_logits, teacher_logits (N, C), true_labels (N,) int64, -100 where a row has none. Returns a number in
        the wider of the logits' dtypes, float32 under autocast.

        What else torch's losses take is computed by plain PyTorch: logits (N, C, d1, ...), class probabilities or uint8
        as labels, a teacher of other rows that broadcasts. Logits of (batch, seq, V) with labels of (batch, seq) are
        taken as batch * seq rows. Where seq is V, torch could mean the classes by either; these are refused: flatten
        them first.
        """
        student, teacher = student_logits, teacher_logits
        if not all(isinstance(t, Tensor) for t in (student, teacher, true_labels)):
            return op.distillation(student, teacher, true_labels)  # which says what is wrong
        if student.dim() > 2 and student.shape[2:] == student.shape[1:-1] and true_labels.shape == student.shape[:-1]:
            raise ValueError(
                f"student_logits: expected rows of classes whose last dimension is told from the second, got shape "
                f"{tuple(student.shape)}; flatten them to (N, {student.size(-1)})"
            )
        if _for_torch(student, teacher, true_labels):
            return distilled(student, teacher, true_labels, self.temperature, self.alpha)
        student, teacher = _widened(student, [student], teacher, [teacher])
        loss = op.distillation(student, teacher, true_labels, temperature=self.temperature, alpha=self.alpha)
        return _as_torch(loss, student)


class LinearDistillationLoss(_Distillation):
    """DistillationLoss of both models' hidden states and last layers: `llmkern.functional.linear_distillation`, which
    never holds all logits of either; the teacher gets no gradient."""

    def forward(
        self, student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor,
        true_labels: Tensor, student_bias: Tensor | None = None, teacher_bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """student_hidden (..., D), student_weight (V, D), teacher_hidden (..., E), teacher_weight (V, E), true_labels
        (...) int64, biases (V,). Returns a number in the wider of both models' dtypes, float32 under autocast. The
        narrower model's tensors, its weight too, are copied in the wider dtype where they differ."""
        student = [student_hidden, student_weight, student_bias]
        teacher = [teacher_hidden, teacher_weight, teacher_bias]
        widened = _widened(student_hidden, student, teacher_hidden, teacher)
        student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias = widened
        loss = op.linear_distillation(
            student_hidden, student_weight, teacher_hidden, teacher_weight, true_labels, student_bias, teacher_bias,
            temperature=self.temperature, alpha=self.alpha,
        )  # fmt: skip
        return _as_torch(loss, student_hidden)


def _for_torch(student: Tensor, teacher: Tensor, labels: Tensor) -> bool:
    """Whether the call is one that torch's losses take and the kernels do not."""
    same, plain = teacher.shape == student.shape, teacher.dim() == student.dim() > 1
    rows = labels.shape == student.shape[:-1]
    channels = student.dim() > 2 and labels.shape == student.shape[:1] + student.shape[2:] and not rows
    probabilities = labels.is_floating_point() and labels.shape == student.shape
    narrow = labels.dtype == torch.uint8 and rows and student.dim() == 2
    if not plain:
        return False
    if same:
        return bool(channels or probabilities or narrow)
    return student.dim() == 2 and all(1 in (a, b) or a == b for a, b in zip(teacher.shape, student.shape, strict=True))


def _widened(student: Any, of_student: Sequence[Any], teacher: Any, of_teacher: Sequence[Any]) -> list[Any]:
    """The tensors that have the student's dtype, or the teacher's, in the wider of both, as torch promotes them."""
    given = [*of_student, *of_teacher]
    floats = all(isinstance(t, Tensor) and t.is_floating_point() for t in (student, teacher))
    if not floats or student.dtype == teacher.dtype:
        return given
    wide = torch.promote_types(student.dtype, teacher.dtype)
    own = [student.dtype] * len(of_student) + [teacher.dtype] * len(of_teacher)
    return [t.to(wide) if isinstance(t, Tensor) and t.dtype == d else t for t, d in zip(given, own, strict=True)]


def _as_torch(loss: Tensor, x: Tensor) -> Tensor:
    """In the dtype that torch's own losses have of this input."""
    return loss if autocast.is_on(x.device) else loss.to(x.dtype)


def _described(x: Any) -> str:
    return f"{tuple(x.shape)} {check.short(x.dtype)}" if isinstance(x, Tensor) else type(x).__name__
