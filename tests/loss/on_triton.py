"""What holds of the Triton kernels of this family however they are run: in the interpreter, and as PTX."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern.loss import reference, triton_launch, triton_linear
from llmkern.verify import verify
from tests.loss.cases import IGNORED, classes, cross_entropy, distillation, heads, logits


def hold(fast, plain, given) -> None:
    verify(fast, plain, given, gradients=False).raise_if_failed()


def hold_cross_entropy(run, x: Tensor, targets: Tensor, smoothing: float = 0.0, z_loss: float = 0.0) -> None:
    """Forward, and backward from the plain version's log-sum-exps."""

    def fast(*args):
        return triton_launch.cross_entropy(run, *args)

    hold(cross_entropy(smoothing, z_loss, fast), cross_entropy(smoothing, z_loss), (x, targets))
    lse = reference.cross_entropy(x, targets, IGNORED, smoothing, z_loss)[1]
    options = IGNORED, smoothing, z_loss
    hold(
        lambda *args: triton_launch.cross_entropy_backward(run, *args, *options),
        lambda *args: reference.cross_entropy_backward(*args, *options),
        (torch.randn(x.size(0)), x, targets, lse),
    )


def hold_distillation(
    run, student: Tensor, teacher: Tensor, targets: Tensor, temperature: float,
    each=((True, True), (True, False), (False, True)),
) -> None:  # fmt: skip
    """Forward with statistics, and backward from the plain version's."""

    def fast(*args):
        return triton_launch.distillation(run, *args)

    hold(distillation(temperature, fast), distillation(temperature), (student, teacher, targets))
    given = student, teacher, targets, temperature, IGNORED
    soft, _, statistics = reference.distillation(*given)
    torch.testing.assert_close(
        fast(*given)[2].float(), statistics.float(), equal_nan=True, rtol=1e-5, atol=1e-5
    )  # fmt: skip
    grads = torch.randn(2, student.size(0))
    for needs in each:
        options = temperature, IGNORED, needs
        hold(
            lambda *args, o=options: triton_launch.distillation_backward(run, *args, *o),
            lambda *args, o=options: reference.distillation_backward(*args, *o),
            (grads[0], grads[1], student, teacher, targets, statistics, soft),
        )


def hold_linear(run, rows: int, count: int, dtype: torch.dtype, reduction: str, biased: bool = True) -> None:
    hidden, weight, bias = heads(rows, (24,), count, dtype)
    given = hidden, weight, bias if biased else None, classes(rows, count)
    options = IGNORED, 0.1, 1e-2, reduction, (True, True, True)
    hold(
        lambda *args: _without_sums(triton_linear.linear_cross_entropy(run, *args, *options)),
        lambda *args: _without_sums(reference.linear_cross_entropy(*args, *options)),
        given,
    )
    if reduction == "none":
        lse = reference.linear_cross_entropy(*given, *options)[1]
        rest = *options[:3], (True, True, True)
        hold(
            lambda *args: triton_linear.linear_cross_entropy_backward(run, *args, *rest),
            lambda *args: reference.linear_cross_entropy_backward(*args, *rest),
            (torch.randn(rows), *given, lse),
        )


def _without_sums(found):
    return found[0], *found[2:]


def hold_linear_distillation(run, rows: int, count: int, dtype: torch.dtype, needs=(True, True, True)) -> None:
    given = *heads(rows, (24, 40), count, dtype), classes(rows, count)
    options = 2.0, 0.3, IGNORED, needs
    hold(
        lambda *args: triton_linear.linear_distillation(run, *args, *options),
        lambda *args: reference.linear_distillation(*args, *options),
        given,
    )


def pair(shape: tuple[int, int], dtype: torch.dtype, apart: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher and targets; the teacher's logits are near the student's."""
    student, targets = logits(shape, dtype)
    return student, (student.float() + apart * torch.randn(shape)).to(dtype), targets
