"""torch.ops.llmkern.linear_distillation: distillation of both models' hidden states, without logits in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llmkern import check
from llmkern.backend import Operator, reference_backend
from llmkern.loss import reference
from llmkern.loss.compiled_linear import CPU_LINEAR_DISTILLATION
from llmkern.loss.op import checks, kept
from llmkern.loss.op.linear import empty_gradients
from llmkern.loss.triton_linear import TRITON_LINEAR_DISTILLATION
from llmkern.operator import define


def linear_distillation(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, targets: Tensor,
    student_bias: Tensor | None = None, teacher_bias: Tensor | None = None, *, temperature: float = 4.0,
    alpha: float = 0.3, ignore_index: int = -100,
) -> Tensor:  # fmt: skip
    """distillation(student_hidden @ student_weight.T + student_bias, the teacher's alike, targets), which never holds
    all logits of either.

    student_hidden: (..., D), float32, bfloat16 or float16 (float64 as plain PyTorch); student_weight: (V, D),
    student_bias: (V,). The teacher's: the same leading shape, dtype and V, any width; they get no gradient, as if they
    were detached. Under autocast all are cast to its dtype. targets: the hidden states' shape without the last
    dimension, int64. Options and result: as `distillation`.

    The student's gradients are made with the loss, chunk by chunk, and kept for the backward.

    Raises as `distillation`. Source: as `distillation` and `linear_cross_entropy`.
    """
    checks.leading(targets, "student_hidden", student_hidden, "D")
    checks.leading(targets, "teacher_hidden", teacher_hidden, "D")
    hidden, taught = (t.reshape(targets.numel(), t.size(-1)) for t in (student_hidden, teacher_hidden))
    teacher = (t.detach() if isinstance(t, Tensor) else t for t in (taught, teacher_weight, teacher_bias))
    args = hidden, student_weight, student_bias, *teacher, targets.reshape(-1), temperature, alpha, ignore_index
    return kept.loss("linear_distillation", _LinearDistillation, _checked_run, args)


def _check(
    student_hidden: Tensor, student_weight: Tensor, student_bias: Tensor | None, teacher_hidden: Tensor,
    teacher_weight: Tensor, teacher_bias: Tensor | None, targets: Tensor, temperature: float, alpha: float,
    ignore_index: int, needs: Sequence[bool],
) -> None:  # fmt: skip
    checks.head("student_", student_hidden, student_weight, student_bias)
    check.same_dtype("teacher_hidden", teacher_hidden, "student_hidden", student_hidden)
    check.same_device("teacher_hidden", teacher_hidden, "student_hidden", student_hidden)
    checks.head("teacher_", teacher_hidden, teacher_weight, teacher_bias)
    for name, value, other in (
        ("teacher_hidden: expected the rows of student_hidden", teacher_hidden, student_hidden),
        ("teacher_weight: expected the classes of student_weight", teacher_weight, student_weight),
    ):
        if value.size(0) != other.size(0):
            raise ValueError(f"{name}, {other.size(0)}, got {value.size(0)}")
    checks.of_rows("targets", targets, torch.int64, "student_hidden", student_hidden)
    checks.temperature(temperature)
    check.finite("alpha", alpha)


def _example(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    hidden, weight = torch.empty(8, 64, dtype=dtype, device=device), torch.empty(96, 64, dtype=dtype, device=device)
    targets = torch.empty(8, dtype=torch.int64, device=device)
    return hidden, weight, None, hidden, weight, None, targets, 4.0, 0.3, -100, (True, True, False)


_LINEAR = Operator(
    "linear_distillation", _check, _example,
    cpu=[CPU_LINEAR_DISTILLATION, reference_backend(reference.linear_distillation)],
    cuda=[TRITON_LINEAR_DISTILLATION, reference_backend(reference.linear_distillation)],
    other=[reference_backend(reference.linear_distillation)],
)  # fmt: skip


@kept.without_autocast
def _checked_run(*args: Any) -> tuple[Tensor, ...]:
    """The backends give both losses of each row; the operator gives them combined, and by themselves."""
    *given, wanted = args
    _check(*args)
    weight, targets, temperature, alpha, ignore_index = args[1], *args[6:10]
    checks.in_range(targets, weight.size(0), ignore_index)
    soft, hard, *gradients = _LINEAR.run(*given, tuple(wanted))
    loss = reference.combined(soft, hard, targets, temperature, alpha, ignore_index)
    return loss, soft, hard, *gradients


def _fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    _check(hidden, weight, bias, *rest)
    dtype = reference.widened(hidden.dtype)
    loss, soft, hard = (hidden.new_empty(shape, dtype=dtype) for shape in ((), hidden.size(0), hidden.size(0)))
    gradients = empty_gradients(hidden, weight, bias, rest[-1], reference.gradient_dtype(hidden.dtype))
    return loss, soft, hard, *gradients


def _again(
    inputs: Sequence[Any], results: Sequence[Tensor], grad: Tensor, needed: tuple[bool, ...]
) -> Sequence[Tensor | None]:
    """With all logits in memory: it is rare that a loss of hidden states is differentiated twice."""
    hidden, weight, bias, taught, head, taught_bias, targets, temperature, alpha, ignore_index, _ = inputs
    student, teacher = F.linear(hidden, weight, bias), F.linear(taught, head, taught_bias)
    rest = temperature, ignore_index
    soft, hard, statistics = torch.ops.llmkern.distillation(student, teacher, targets, *rest)
    grad_soft = (grad * (alpha * temperature**2 / max(targets.size(0), 1))).expand(soft.shape)
    grad_hard = (grad * (1.0 - alpha) * reference.mean_factor(targets, ignore_index, grad.dtype)).expand(hard.shape)
    of_student, _ = torch.ops.llmkern.distillation_backward(
        grad_soft, grad_hard, student, teacher, targets, statistics, soft, *rest, [True, False]
    )
    return of_student @ weight, of_student.t() @ hidden, None if bias is None else of_student.sum(0)


_setup, _backward = kept.rules(_again)
define(
    "linear_distillation(Tensor student_hidden, Tensor student_weight, Tensor? student_bias, Tensor teacher_hidden, "
    "Tensor teacher_weight, Tensor? teacher_bias, Tensor targets, float temperature, float alpha, int ignore_index, "
    "bool[3] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _checked_run, _fake, setup_context=_setup, backward=_backward,
)  # fmt: skip
_LinearDistillation = kept.function(_checked_run, _again)
