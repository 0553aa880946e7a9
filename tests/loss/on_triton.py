"""What holds of the Triton kernels of this family however they are run: in the interpreter, and as PTX."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern.loss import reference, triton_launch, triton_linear
from llmkern.verify import verify
from tests.loss.cases import IGNORED, classes, cross_entropy, distillation, heads, logits
from tests.loss.far import close, cross_entropy_gradient, distillation_gradients


def hold(fast, plain, given) -> None:
    verify(fast, plain, given, gradients=False).raise_if_failed()


def hold_cross_entropy(run, x: Tensor, targets: Tensor, smoothing: float = 0.0, z_loss: float = 0.0) -> None:
    """Forward, and backward from the plain version's log-sum-exps, which are those of the inputs in every draw."""

    def fast(*args):
        return triton_launch.cross_entropy(run, *args)

    hold(cross_entropy(smoothing, z_loss, fast), cross_entropy(smoothing, z_loss), (x, targets))
    options = IGNORED, smoothing, z_loss

    def backward(function):
        def call(grad, x, targets):
            return function(grad, x, targets, reference.cross_entropy(x, targets, *options)[1], *options)

        return call

    hold(
        backward(lambda *args: triton_launch.cross_entropy_backward(run, *args)),
        backward(reference.cross_entropy_backward),
        (torch.randn(x.size(0)), x, targets),
    )


def hold_distillation(
    run, student: Tensor, teacher: Tensor, targets: Tensor, temperature: float,
    each=((True, True), (True, False), (False, True)),
) -> None:  # fmt: skip
    """Forward with statistics, and backward from the plain version's, those of the inputs in every draw."""

    def fast(*args):
        return triton_launch.distillation(run, *args)

    hold(distillation(temperature, fast), distillation(temperature), (student, teacher, targets))
    given = student, teacher, targets, temperature, IGNORED
    statistics = reference.distillation(*given)[2]
    torch.testing.assert_close(
        fast(*given)[2].float(), statistics.float(), equal_nan=True, rtol=1e-5, atol=1e-5
    )  # fmt: skip
    grads = torch.randn(2, student.size(0))

    def backward(function, needs):
        def call(grad_soft, grad_hard, *logits):
            soft, _, statistics = reference.distillation(*logits, temperature, IGNORED)
            return function(grad_soft, grad_hard, *logits, statistics, soft, temperature, IGNORED, needs)

        return call

    for needs in each:
        hold(
            backward(lambda *args: triton_launch.distillation_backward(run, *args), needs),
            backward(reference.distillation_backward, needs),
            (grads[0], grads[1], student, teacher, targets),
        )


def hold_far(run, x: Tensor, targets: Tensor) -> None:
    """Gradients of logits far from 0 against torch's, with what the kernels' own forwards keep."""
    for options in ((0.0, 0.0), (0.1, 1e-3)):
        _, lse = triton_launch.cross_entropy(run, x, targets, IGNORED, *options)
        ones = torch.ones(len(x))
        found = triton_launch.cross_entropy_backward(run, ones, x, targets, lse, IGNORED, *options)
        close(found, cross_entropy_gradient(x, targets, *options))
    usual, temperature = torch.randn(x.shape).to(x.dtype), 4.0  # exact quotients: the kernel divides differences
    for student, teacher in ((x, usual), (usual, x)):
        soft, _, statistics = triton_launch.distillation(run, student, teacher, targets, temperature, IGNORED)
        given = student, teacher, targets, statistics, soft, temperature, IGNORED, (True, True)
        found = triton_launch.distillation_backward(run, ones, ones, *given)
        expected = distillation_gradients(student, teacher, targets, temperature)
        close(found[0], expected[0])
        small = soft < 100.0
        close(found[1][small], expected[1][small])


def hold_far_linear(run, x: Tensor, targets: Tensor) -> None:
    """Of hidden states and weights whose logits are x exactly."""
    hidden, weight = torch.eye(len(x), dtype=x.dtype), x.t().contiguous()
    options, needs = (IGNORED, 0.0, 0.0), (False, True, False)
    _, lse, _, found, _ = triton_linear.linear_cross_entropy(
        run, hidden, weight, None, targets, *options, "sum", needs
    )  # fmt: skip
    expected = cross_entropy_gradient(x, targets).t()
    close(found.to(x.dtype), expected)
    ones = torch.ones(len(x))
    again = triton_linear.linear_cross_entropy_backward(
        run, ones, hidden, weight, None, targets, lse, *options, needs
    )  # fmt: skip
    close(again[1], expected)


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
        rest = *options[:3], (True, True, True)

        def backward(function):
            def call(*args):
                return function(*args, reference.linear_cross_entropy(*args[1:], *options)[1], *rest)

            return call

        hold(
            backward(lambda *args: triton_linear.linear_cross_entropy_backward(run, *args)),
            backward(reference.linear_cross_entropy_backward),
            (torch.randn(rows), *given),
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
