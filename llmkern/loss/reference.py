"""Losses over a vocabulary in plain PyTorch: what every kernel of this family is held to.

N rows, V classes, D wide hidden states. Arithmetic is float32 for 16 bits and float32, float64 for float64. The
log-sum-exps that a forward gives are for the backwards of the kernels (`together`); those here make both of its parts
again, and subtract one after the other as torch's log_softmax does, so that no size of logits costs digits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def widened(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def widen(x: Tensor) -> Tensor:
    """x in the dtype of the arithmetic, its rows side by side, so that sums go the same way whatever the strides."""
    return x.to(widened(x.dtype)).contiguous()


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of gradients that are kept for an upstream gradient of 1: a loss that is not scaled up yet has gradients below
    the smallest float16."""
    return torch.float32 if dtype == torch.float16 else dtype


def log_sum(wide: Tensor) -> tuple[Tensor, Tensor]:
    """x - max(x) and log(sum(exp(x - max(x)))) of the last dimension; NaN for rows whose largest is infinite."""
    shifted = wide - wide.detach().amax(-1, keepdim=True)
    return shifted, shifted.exp().sum(-1).log()


def log_softmax(wide: Tensor) -> Tensor:
    shifted, logarithm = log_sum(wide)
    return shifted - logarithm[:, None]


def together(highest: Tensor, logarithm: Tensor) -> Tensor:
    """A log-sum-exp, (N,) float64, as the kernels' backwards take it.

    Of float32: highest + logarithm, the logarithm times |highest| / 2**30 where that is more than 1, beside which it
    would be lost (csrc/loss/row.h). Of float64, which no kernel takes: the sum.
    """
    if highest.dtype == torch.float64:
        return highest + logarithm
    highest = highest.double()
    return highest + logarithm.double() * (highest.abs() * 2.0**-30).clamp(min=1.0)


def log_sum_exp(wide: Tensor) -> Tensor:
    return together(wide.detach().amax(-1), log_sum(wide)[1])


def classes(targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Whether a row counts (N,), and its class as an index (N, 1), 0 where it does not."""
    counted = targets != ignore_index
    return counted, torch.where(counted, targets, 0)[:, None]


def mean_factor(targets: Tensor, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """What a mean's gradients are multiplied by: 1 / the rows that count, 1 where none does: those gradients are 0."""
    return (targets != ignore_index).sum().clamp(min=1).to(dtype).reciprocal()


def cross_entropy(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    """The loss of each row, (N,) float32, and its log-sum-exp, `together`; both 0 where targets is ignore_index.

    loss = lse - (1 - s) x_target - s mean(x) + z lse^2, with s label_smoothing and z z_loss. logits (N, V).
    """
    wide = widen(logits)
    counted, index = classes(targets, ignore_index)
    shifted, logarithm = log_sum(wide)
    given = shifted.gather(-1, index)[:, 0]
    if label_smoothing:  # 0 times the mean of a row with -inf would be NaN
        given = (1.0 - label_smoothing) * given + label_smoothing * shifted.mean(-1)
    loss = logarithm - given
    highest = wide.detach().amax(-1)
    lse = together(highest, logarithm)
    if z_loss:
        loss = loss + z_loss * (highest + logarithm).square()
    return torch.where(counted, loss, 0.0), torch.where(counted, lse, 0.0)


def cross_entropy_backward(
    grad_loss: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, ignore_index: int, label_smoothing: float,
    z_loss: float,
) -> Tensor:  # fmt: skip
    """The gradient of logits, in their dtype: grad_loss (p - s / V - (1 - s) [v = target] + 2 z lse p), p the
    probabilities; 0 in rows that do not count. The part of z is added last, as it is small. lse is made again."""
    wide = widen(logits)
    counted, index = classes(targets, ignore_index)
    shifted, logarithm = log_sum(wide)
    p = (shifted - logarithm[:, None]).exp()
    right = torch.full_like(index, 1.0 - label_smoothing, dtype=wide.dtype)
    grad = (p - label_smoothing / wide.size(-1)).scatter_add(-1, index, -right)
    if z_loss:
        grad = grad + p * (2.0 * z_loss * (wide.detach().amax(-1) + logarithm))[:, None]
    grad = grad * grad_loss.to(wide.dtype)[:, None]
    return torch.where(counted[:, None], grad, 0.0).to(logits.dtype)


def gradient_shapes(head: Sequence[Tensor | None], needs: Sequence[bool]) -> list[tuple[int, ...]]:
    """Of the gradients of a head's tensors (hidden, weight, bias): those of 0 elements are not needed, or of none."""
    return [tuple(t.shape) if n and t is not None else (0,) for t, n in zip(head, needs, strict=True)]


def linear_gradients(
    grad_logits: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, factor: Tensor | float,
    needs: tuple[bool, bool, bool], dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of hidden, weight and bias in `dtype`, times factor; empty where they are not needed."""
    wide = widened(hidden.dtype)
    grad = grad_logits.to(wide)
    nothing = [hidden.new_empty(0, dtype=dtype) for _ in range(3)]
    return (
        (grad @ weight.to(wide) * factor).to(dtype) if needs[0] else nothing[0],
        (grad.T @ hidden.to(wide) * factor).to(dtype) if needs[1] else nothing[1],
        (grad.sum(0) * factor).to(dtype) if needs[2] and bias is not None else nothing[2],
    )


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int, label_smoothing: float,
    z_loss: float, reduction: str, needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """cross_entropy of hidden @ weight.T + bias -> (loss (N,), lse (N,), gradients of hidden, weight and bias).

    The gradients are those of the sum or mean of loss over the rows that count, in gradient_dtype; empty where they
    are not needed, and for the reduction "none". The mean's division comes after the products, so that no gradient of
    logits is too small for its dtype.
    """
    logits = F.linear(hidden, weight, bias)
    loss, lse = cross_entropy(logits, targets, ignore_index, label_smoothing, z_loss)
    dtype = gradient_dtype(hidden.dtype)
    if reduction == "none" or not any(needs):
        return loss, lse, *linear_gradients(logits, hidden, weight, bias, 1.0, (False,) * 3, dtype)
    grad = cross_entropy_backward(torch.ones_like(loss), logits, targets, lse, ignore_index, label_smoothing, z_loss)
    factor = mean_factor(targets, ignore_index, loss.dtype) if reduction == "mean" else 1.0
    return loss, lse, *linear_gradients(grad, hidden, weight, bias, factor, needs, dtype)


def linear_cross_entropy_backward(
    grad_loss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, lse: Tensor,
    ignore_index: int, label_smoothing: float, z_loss: float, needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of hidden, weight and bias, in their dtype, from those of the rows' losses; the logits are made
    again."""
    logits = F.linear(hidden, weight, bias)
    grad = cross_entropy_backward(grad_loss, logits, targets, lse, ignore_index, label_smoothing, z_loss)
    return linear_gradients(grad, hidden, weight, bias, 1.0, needs, hidden.dtype)


def distillation(
    student: Tensor, teacher: Tensor, targets: Tensor, temperature: float, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(soft (N,), hard (N,), statistics (N, 3)) of logits (N, V).

    soft = KL(softmax(teacher / T) || softmax(student / T)), of every row; a class that the teacher gives no probability
    adds nothing. hard = the student's cross-entropy, 0 in rows that do not count. statistics: log-sum-exps of
    student / T, of student, and of teacher / T, each `together`.
    """
    wide, taught = widen(student), widen(teacher)
    (shifted, of_student), (taught_shifted, of_teacher) = (log_sum(x / temperature) for x in (wide, taught))
    log_q = taught_shifted - of_teacher[:, None]
    q = log_q.exp()
    difference = log_q - (shifted - of_student[:, None])
    soft = (q * torch.where(q == 0.0, 0.0, difference)).sum(-1)  # 0 times an infinite difference would be NaN
    hard, _ = cross_entropy(student, targets, ignore_index, 0.0, 0.0)
    sums = log_sum_exp(wide / temperature), log_sum_exp(wide), log_sum_exp(taught / temperature)
    return soft, hard, torch.stack(sums, -1)


def distillation_backward(
    grad_soft: Tensor, grad_hard: Tensor, student: Tensor, teacher: Tensor, targets: Tensor, statistics: Tensor,
    soft: Tensor, temperature: float, ignore_index: int, needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of student and teacher, in their dtype; empty where they are not needed.

    Of the student grad_soft (p - q) / T + that of the cross-entropy; of the teacher
    grad_soft q (log q - log p - soft) / T. statistics are made again.
    """
    wide, taught = widen(student), widen(teacher)
    log_p, log_q = log_softmax(wide / temperature), log_softmax(taught / temperature)
    q, scale = log_q.exp(), (grad_soft.to(wide.dtype) / temperature)[:, None]
    of_student, of_teacher = student.new_empty(0), teacher.new_empty(0)
    if needs[0]:
        hard = cross_entropy_backward(grad_hard, wide, targets, statistics[:, 1], ignore_index, 0.0, 0.0)
        of_student = (scale * (log_p.exp() - q) + hard).to(student.dtype)
    if needs[1]:
        difference = torch.where(q == 0.0, 0.0, log_q - log_p - soft.to(wide.dtype)[:, None])
        of_teacher = (scale * q * difference).to(teacher.dtype)
    return of_student, of_teacher


def distillation_backward_of_logits(
    grad_soft: Tensor, grad_hard: Tensor, student: Tensor, teacher: Tensor, targets: Tensor, statistics: Tensor,
    soft: Tensor, temperature: float, ignore_index: int, needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same with soft made of the logits again, through which its own gradient flows."""
    soft, *_ = distillation(student, teacher, targets, temperature, ignore_index)
    return distillation_backward(
        grad_soft, grad_hard, student, teacher, targets, statistics, soft, temperature, ignore_index, needs
    )


def combined(
    soft: Tensor, hard: Tensor, targets: Tensor, temperature: float, alpha: float, ignore_index: int
) -> Tensor:
    """alpha T^2 sum(soft) / N + (1 - alpha) sum(hard) / the rows that count, a number."""
    mean = hard.sum() / (targets != ignore_index).sum()
    return alpha * (soft.sum() / soft.size(0) * temperature**2) + (1.0 - alpha) * mean


def linear_distillation(
    student_hidden: Tensor, student_weight: Tensor, student_bias: Tensor | None, teacher_hidden: Tensor,
    teacher_weight: Tensor, teacher_bias: Tensor | None, targets: Tensor, temperature: float, alpha: float,
    ignore_index: int, needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """distillation of both heads' logits -> (soft (N,), hard (N,), gradients of the student's hidden, weight and bias).

    The gradients are those of `combined`, in gradient_dtype; empty where they are not needed. The division by N comes
    after the products.
    """
    student = F.linear(student_hidden, student_weight, student_bias)
    teacher = F.linear(teacher_hidden, teacher_weight, teacher_bias)
    soft, hard, statistics = distillation(student, teacher, targets, temperature, ignore_index)
    given, dtype = (student_hidden, student_weight, student_bias), gradient_dtype(student_hidden.dtype)
    if not any(needs):
        return soft, hard, *linear_gradients(student, *given, 1.0, needs, dtype)
    rows = max(soft.size(0), 1)
    grad, _ = distillation_backward(
        torch.full_like(soft, alpha * temperature**2),
        mean_factor(targets, ignore_index, hard.dtype).mul((1.0 - alpha) * rows).expand(hard.shape),
        student, teacher, targets, statistics, soft, temperature, ignore_index, (True, False),
    )  # fmt: skip
    return soft, hard, *linear_gradients(grad, *given, 1.0 / rows, needs, dtype)


def linear_distillation_loss(
    student_hidden: Tensor, student_weight: Tensor, student_bias: Tensor | None, teacher_hidden: Tensor,
    teacher_weight: Tensor, teacher_bias: Tensor | None, targets: Tensor, temperature: float, alpha: float,
    ignore_index: int,
) -> tuple[Tensor]:  # fmt: skip
    """`combined` of both heads' logits, as autograd differentiates it."""
    student = F.linear(student_hidden, student_weight, student_bias)
    teacher = F.linear(teacher_hidden, teacher_weight, teacher_bias)
    soft, hard, _ = distillation(student, teacher, targets, temperature, ignore_index)
    return (combined(soft, hard, targets, temperature, alpha, ignore_index),)
