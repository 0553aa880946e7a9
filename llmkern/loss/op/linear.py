"""torch.ops.llmkern.linear_cross_entropy and its backward: the loss of hidden states without their logits in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmkern import check
from llmkern.backend import Operator, reference_backend
from llmkern.loss import reference
from llmkern.loss.compiled_linear import CPU_LINEAR_CROSS_ENTROPY, CPU_LINEAR_CROSS_ENTROPY_BACKWARD
from llmkern.loss.op import checks, kept
from llmkern.loss.op.cross_entropy import reduced
from llmkern.loss.triton_linear import TRITON_LINEAR_CROSS_ENTROPY, TRITON_LINEAR_CROSS_ENTROPY_BACKWARD
from llmkern.operator import define
from llmkern.second_order import backward_of, setup


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, *, ignore_index: int = -100,
    label_smoothing: float = 0.0, z_loss: float = 0.0, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """cross_entropy(hidden @ weight.T + bias, targets), which never holds all logits, nor their gradients.

    hidden: (..., D), float32, bfloat16 or float16 (float64 as plain PyTorch). weight: (V, D), bias: (V,), in the same
    dtype; under autocast all are cast to its dtype, as torch casts those of a linear layer. targets: hidden's shape
    without the last dimension, int64. Options, result and the rows that count: as `cross_entropy`.

    For "mean" and "sum" the gradients that autograd will ask for are made with the loss, chunk by chunk, and kept; the
    backward multiplies them by its one number. For "none" the backward makes the logits again.

    Raises as `cross_entropy`. Source: the idea is that of Liger-Kernel's fused_linear_cross_entropy (Hsu et al. 2024,
    "Liger Kernel") and of Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models".
    """
    check.one_of("reduction", reduction, checks.REDUCTIONS)
    checks.leading(targets, "hidden", hidden, "D")
    if reduction == "mean" and hasattr(hidden, "placements"):
        return _mean_of_parts(hidden, weight, targets, bias, ignore_index, label_smoothing, z_loss)
    rows = hidden.reshape(targets.numel(), hidden.size(-1))
    args = rows, weight, bias, targets.reshape(-1), ignore_index, label_smoothing, z_loss, reduction
    loss = kept.loss("linear_cross_entropy", _LinearCrossEntropy, _checked_run, args)
    return loss.view(targets.shape) if reduction == "none" else loss


def _mean_of_parts(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, ignore_index: int, *options: float
) -> Tensor:
    """Of DTensors: each process has the sum of its rows, and their number is that of all."""
    label_smoothing, z_loss = options
    total = linear_cross_entropy(
        hidden, weight, targets, bias, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss,
        reduction="sum",
    )  # fmt: skip
    count = (targets != ignore_index).sum()
    # NaN where no row counts, with gradients of 0: what is added has none.
    return total * reference.mean_factor(targets, ignore_index, total.dtype) + (count / count - 1.0)


def _check(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int, label_smoothing: float,
    z_loss: float, reduction: str, needs: Sequence[bool],
) -> None:  # fmt: skip
    checks.head("", hidden, weight, bias)
    checks.of_rows("targets", targets, torch.int64, "hidden", hidden)
    checks.options(label_smoothing, z_loss)
    check.one_of("reduction", reduction, checks.REDUCTIONS)


def _check_backward(
    grad_loss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, lse: Tensor,
    ignore_index: int, label_smoothing: float, z_loss: float, needs: Sequence[bool],
) -> None:  # fmt: skip
    _check(hidden, weight, bias, targets, ignore_index, label_smoothing, z_loss, "none", needs)
    checks.of_rows("grad_loss", grad_loss, reference.widened(hidden.dtype), "hidden", hidden)
    checks.of_rows("lse", lse, torch.float64, "hidden", hidden)


def _example(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    hidden, weight = torch.empty(8, 64, dtype=dtype, device=device), torch.empty(96, 64, dtype=dtype, device=device)
    targets = torch.empty(8, dtype=torch.int64, device=device)
    return hidden, weight, None, targets, -100, 0.0, 0.0, "mean", (True, True, False)


def _backward_example(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    hidden, weight, bias, targets, *options, _, needs = _example(device, dtype)
    grad, lse = (torch.empty(8, dtype=d, device=device) for d in (reference.widened(dtype), torch.float64))
    return grad, hidden, weight, bias, targets, lse, *options, needs


_LINEAR = Operator(
    "linear_cross_entropy", _check, _example,
    cpu=[CPU_LINEAR_CROSS_ENTROPY, reference_backend(reference.linear_cross_entropy)],
    cuda=[TRITON_LINEAR_CROSS_ENTROPY, reference_backend(reference.linear_cross_entropy)],
    other=[reference_backend(reference.linear_cross_entropy)],
)  # fmt: skip
_BACKWARD = Operator(
    "linear_cross_entropy_backward", _check_backward, _backward_example,
    cpu=[CPU_LINEAR_CROSS_ENTROPY_BACKWARD, reference_backend(reference.linear_cross_entropy_backward)],
    cuda=[TRITON_LINEAR_CROSS_ENTROPY_BACKWARD, reference_backend(reference.linear_cross_entropy_backward)],
    other=[reference_backend(reference.linear_cross_entropy_backward)],
)  # fmt: skip


@kept.without_autocast
def _checked_run(*args: Any) -> tuple[Tensor, ...]:
    """The backends give the loss of each row; the operator gives it reduced."""
    *given, wanted = args
    _check(*args)
    weight, targets, ignore_index, reduction = args[1], args[3], args[4], args[7]
    checks.in_range(targets, weight.size(0), ignore_index)
    loss, *rest = _LINEAR.run(*given, tuple(wanted))
    return (loss if reduction == "none" else reduced(loss, targets, ignore_index, reduction)), *rest


@kept.without_autocast
def _run_backward(*args: Any) -> tuple[Tensor, ...]:
    *given, wanted = args
    return tuple(_BACKWARD.run(*given, tuple(wanted)))


def empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: Sequence[bool], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Unwritten memory for the gradients, of 0 elements for those that are not wanted."""
    shapes = reference.gradient_shapes((hidden, weight, bias), wanted)
    of_hidden, of_weight, of_bias = (hidden.new_empty(shape, dtype=dtype) for shape in shapes)
    return of_hidden, of_weight, of_bias


def _fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    _check(hidden, weight, bias, *rest)
    *_, reduction, wanted = rest
    rows, none = (hidden.size(0),), reduction == "none"
    gradients = empty_gradients(
        hidden, weight, bias, (False,) * 3 if none else wanted, reference.gradient_dtype(hidden.dtype)
    )  # fmt: skip
    loss = hidden.new_empty(rows if none else (), dtype=reference.widened(hidden.dtype))
    return loss, hidden.new_empty(rows, dtype=torch.float64), *gradients


def _fake_backward(
    grad_loss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    _check_backward(grad_loss, hidden, weight, bias, *rest)
    return empty_gradients(hidden, weight, bias, rest[-1], hidden.dtype)


def _again(
    inputs: Sequence[Any], results: Sequence[Tensor], grad: Tensor, needed: tuple[bool, ...]
) -> Sequence[Tensor | None]:
    hidden, weight, bias, targets, *options, reduction, _ = inputs
    if reduction == "mean":
        grad = grad * reference.mean_factor(targets, options[0], grad.dtype)
    grad = grad.expand(targets.shape)
    found: Sequence[Tensor] = torch.ops.llmkern.linear_cross_entropy_backward(
        grad, hidden, weight, bias, targets, results[0], *options, list(needed)
    )
    return found


_setup, _backward = kept.rules(_again)
define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, int ignore_index, "
    "float label_smoothing, float z_loss, str reduction, bool[3] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _checked_run, _fake, setup_context=_setup, backward=_backward,
)  # fmt: skip
define(
    "linear_cross_entropy_backward(Tensor grad_loss, Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, "
    "Tensor lse, int ignore_index, float label_smoothing, float z_loss, bool[3] needs) -> (Tensor, Tensor, Tensor)",
    _run_backward, _fake_backward, setup_context=setup,
    backward=backward_of(reference.linear_cross_entropy_backward),
)  # fmt: skip
_LinearCrossEntropy = kept.function(_checked_run, _again)
