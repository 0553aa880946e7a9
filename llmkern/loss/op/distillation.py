"""torch.ops.llmkern.distillation and distillation_backward: checks, backends, autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmkern import check
from llmkern.backend import Operator, reference_backend
from llmkern.loss import reference
from llmkern.loss.compiled import CPU_DISTILLATION, CPU_DISTILLATION_BACKWARD
from llmkern.loss.op import checks
from llmkern.loss.triton_launch import TRITON_DISTILLATION, TRITON_DISTILLATION_BACKWARD
from llmkern.operator import call_key, define, dispatch, is_compiling, samples, short_autograd
from llmkern.second_order import backward_of, setup


def distillation(
    student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, *, temperature: float = 4.0, alpha: float = 0.3,
    ignore_index: int = -100,
) -> Tensor:  # fmt: skip
    """alpha T^2 mean(KL(softmax(teacher / T) || softmax(student / T))) + (1 - alpha) cross_entropy(student, targets).

    student_logits, teacher_logits: (..., V), one shape and dtype, float32, bfloat16 or float16 (float64 as plain
    PyTorch), the classes last. targets: their shape without the last dimension, int64. The first mean is over all rows
    (KLDivLoss's batchmean of rows), the second over those whose target is not ignore_index: leave padding out of the
    rows where the teacher's word on it should not count. Classes that both logits rule out by -inf add nothing.
    Returns a number, float32, whatever the dtype (float64 for float64); both logits have gradients.

    Raises as `cross_entropy`, ValueError for a temperature that is not positive. Source: Hinton et al. 2015,
    "Distilling the Knowledge in a Neural Network", section 2.
    """
    check.finite("alpha", alpha)
    checks.leading(targets, "student_logits", student_logits, "V")
    check.is_tensor("teacher_logits", teacher_logits)
    check.shape("teacher_logits", teacher_logits, "the shape of student_logits", tuple(student_logits.shape))
    student, teacher = (t.reshape(targets.numel(), t.size(-1)) for t in (student_logits, teacher_logits))
    classes = targets.reshape(-1)
    args = student, teacher, classes, temperature, ignore_index
    found = None if is_compiling() else call_key(*args)
    if found is not None:
        launch = _DISTILLATION.short.get(found) or _DISTILLATION.short_call(found, _Distillation.apply, *args)
        checks.in_range(classes, student.size(1), ignore_index)
        soft, hard, _ = launch(*args)
    else:
        soft, hard, _ = dispatch("distillation", *args)
    return reference.combined(soft, hard, classes, temperature, alpha, ignore_index)


def _check(student: Tensor, teacher: Tensor, targets: Tensor, temperature: float, ignore_index: int) -> None:
    checks.rows("student", student, "(N, V)")
    checks.like("teacher", teacher, "student", student, "the shape of student", tuple(student.shape))
    checks.of_rows("targets", targets, torch.int64, "student", student)
    checks.temperature(temperature)


def _check_backward(
    grad_soft: Tensor, grad_hard: Tensor, student: Tensor, teacher: Tensor, targets: Tensor, statistics: Tensor,
    soft: Tensor, temperature: float, ignore_index: int, needs: Sequence[bool],
) -> None:  # fmt: skip
    _check(student, teacher, targets, temperature, ignore_index)
    for name, t in (("grad_soft", grad_soft), ("grad_hard", grad_hard), ("soft", soft)):
        checks.of_rows(name, t, reference.widened(student.dtype), "student", student)
    checks.of_rows("statistics", statistics, torch.float64, "student", student, 3)


def _example(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    logits = torch.empty(8, 64, dtype=dtype, device=device)
    return logits, logits, torch.empty(8, dtype=torch.int64, device=device), 4.0, -100


def _backward_example(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    *given, temperature, ignore_index = _example(device, dtype)
    of_rows = torch.empty(8, dtype=reference.widened(dtype), device=device)
    statistics = torch.empty(8, 3, dtype=torch.float64, device=device)
    return of_rows, of_rows, *given, statistics, of_rows, temperature, ignore_index, (True, False)


_DISTILLATION = Operator(
    "distillation", _check, _example,
    cpu=[CPU_DISTILLATION, reference_backend(reference.distillation)],
    cuda=[TRITON_DISTILLATION, reference_backend(reference.distillation)],
    other=[reference_backend(reference.distillation)],
)  # fmt: skip
_BACKWARD = Operator(
    "distillation_backward", _check_backward, _backward_example,
    cpu=[CPU_DISTILLATION_BACKWARD, reference_backend(reference.distillation_backward)],
    cuda=[TRITON_DISTILLATION_BACKWARD, reference_backend(reference.distillation_backward)],
    other=[reference_backend(reference.distillation_backward)],
)  # fmt: skip


def _run(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = _DISTILLATION.run(*args)
    return result


def _checked_run(student: Tensor, teacher: Tensor, targets: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    _check(student, teacher, targets, *rest)
    checks.in_range(targets, student.size(1), rest[-1])
    return _run(student, teacher, targets, *rest)


def _run_backward(*args: Any) -> tuple[Tensor, Tensor]:
    *given, wanted = args
    result: tuple[Tensor, Tensor] = _BACKWARD.run(*given, tuple(wanted))
    return result


def _fake(student: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    _check(student, *rest)
    rows, dtype = student.size(0), reference.widened(student.dtype)
    soft, hard = (student.new_empty(rows, dtype=dtype) for _ in range(2))
    return soft, hard, student.new_empty((rows, 3), dtype=torch.float64)


def _fake_backward(
    grad_soft: Tensor, grad_hard: Tensor, student: Tensor, teacher: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    _check_backward(grad_soft, grad_hard, student, teacher, *rest)
    of_student, of_teacher = (student.new_empty(student.shape if wanted else (0,)) for wanted in rest[-1])
    return of_student, of_teacher


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, targets, *ctx.options = inputs
    soft, _, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.save_for_backward(student, teacher, targets, statistics, soft)


def _backward(ctx: Any, grad_soft: Tensor, grad_hard: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:2])
    found = torch.ops.llmkern.distillation_backward(grad_soft, grad_hard, *ctx.saved_tensors, *ctx.options, needs)
    return *(g if n else None for g, n in zip(found, needs, strict=True)), None, None, None


def _vmap(batch_size: int, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    given = [samples(t, dim, batch_size) for t, dim in zip(args[:3], in_dims[:3], strict=True)]
    flat = (t.reshape(-1, *t.shape[2:]) for t in given)
    found = torch.ops.llmkern.distillation(*flat, *args[3:])
    return tuple(t.view(batch_size, given[2].size(1), *t.shape[1:]) for t in found), (0, 0, 0)


define(
    "distillation(Tensor student, Tensor teacher, Tensor targets, float temperature, int ignore_index) "
    "-> (Tensor, Tensor, Tensor)",
    _checked_run, _fake, setup_context=_setup, backward=_backward, vmap=_vmap,
)  # fmt: skip
define(
    "distillation_backward(Tensor grad_soft, Tensor grad_hard, Tensor student, Tensor teacher, Tensor targets, "
    "Tensor statistics, Tensor soft, float temperature, int ignore_index, bool[2] needs) -> (Tensor, Tensor)",
    _run_backward, _fake_backward, setup_context=setup,
    backward=backward_of(reference.distillation_backward_of_logits),
)  # fmt: skip
_Distillation = short_autograd(_run, _setup, _backward)
