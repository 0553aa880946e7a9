"""torch.ops.llmkern.cross_entropy and cross_entropy_backward: checks, backends, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern import check
from llmkern.backend import Operator, reference_backend
from llmkern.loss import reference
from llmkern.loss.compiled import CPU_CROSS_ENTROPY, CPU_CROSS_ENTROPY_BACKWARD
from llmkern.loss.op import checks
from llmkern.loss.triton_launch import TRITON_CROSS_ENTROPY, TRITON_CROSS_ENTROPY_BACKWARD
from llmkern.operator import call_key, define, dispatch, is_compiling, samples, short_autograd
from llmkern.second_order import backward_of, setup


def cross_entropy(
    logits: Tensor, targets: Tensor, *, ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """The cross-entropy of logits and classes: lse - (1 - s) x_target - s mean(x) + z lse^2 of each row, lse the
    log-sum-exp of its logits x, s label_smoothing, z z_loss.

    logits: (..., V), float32, bfloat16 or float16 (float64 as plain PyTorch), the classes last: torch's (N, C, d1, ...)
    is not taken. targets: their shape without the last dimension, int64; rows with ignore_index count nowhere, not in
    the mean either. reduction: "mean" (over the rows that count; NaN where none does, with gradients of 0, as torch),
    "sum" or "none" (the targets' shape). Returns float32, whatever the dtype (float64 for float64). Of the logits shift
    targets, not them: rows of logits[:, :-1] lie apart and are copied.

    Raises TypeError for a wrong dtype, ValueError for a wrong shape, device or option, IndexError for a class that is
    not there, on the CPU; on a GPU, where that would mean to wait for it, its loss is NaN. Source: Szegedy et al. 2016,
    "Rethinking the Inception Architecture for Computer Vision", section 7 (label smoothing); Chowdhery et al. 2022,
    "PaLM", section 5 (z-loss); Milakov and Gimelshein 2018, "Online normalizer calculation for softmax".
    """
    check.one_of("reduction", reduction, checks.REDUCTIONS)
    checks.leading(targets, "logits", logits, "V")
    rows = logits if logits.dim() == 2 else logits.reshape(targets.numel(), logits.size(-1))
    classes = targets.reshape(-1)
    args = rows, classes, ignore_index, label_smoothing, z_loss
    found = None if is_compiling() else call_key(*args)
    if found is not None:
        launch = _CROSS_ENTROPY.short.get(found) or _CROSS_ENTROPY.short_call(found, _CrossEntropy.apply, *args)
        checks.in_range(classes, rows.size(1), ignore_index)
        loss = launch(*args)[0]
    else:
        loss = dispatch("cross_entropy", *args)[0]
    return loss.view(targets.shape) if reduction == "none" else reduced(loss, classes, ignore_index, reduction)


def reduced(loss: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """The sum or mean of rows' losses; those that do not count are 0."""
    return loss.sum() if reduction == "sum" else loss.sum() / (targets != ignore_index).sum()


def _check(logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float) -> None:
    checks.rows("logits", logits, "(N, V)")
    checks.of_rows("targets", targets, torch.int64, "logits", logits)
    checks.options(label_smoothing, z_loss)


def _check_backward(
    grad_loss: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, ignore_index: int, label_smoothing: float,
    z_loss: float,
) -> None:  # fmt: skip
    _check(logits, targets, ignore_index, label_smoothing, z_loss)
    checks.of_rows("grad_loss", grad_loss, reference.widened(logits.dtype), "logits", logits)
    checks.of_rows("lse", lse, torch.float64, "logits", logits)


def _example(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    logits = torch.empty(8, 64, dtype=dtype, device=device)
    return logits, torch.empty(8, dtype=torch.int64, device=device), -100, 0.0, 0.0


def _backward_example(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    logits, targets, *rest = _example(device, dtype)
    lse = torch.empty(8, dtype=torch.float64, device=device)
    return torch.empty(8, dtype=reference.widened(dtype), device=device), logits, targets, lse, *rest


_CROSS_ENTROPY = Operator(
    "cross_entropy", _check, _example,
    cpu=[CPU_CROSS_ENTROPY, reference_backend(reference.cross_entropy)],
    cuda=[TRITON_CROSS_ENTROPY, reference_backend(reference.cross_entropy)],
    other=[reference_backend(reference.cross_entropy)],
)  # fmt: skip
_BACKWARD = Operator(
    "cross_entropy_backward", _check_backward, _backward_example,
    cpu=[CPU_CROSS_ENTROPY_BACKWARD, reference_backend(reference.cross_entropy_backward)],
    cuda=[TRITON_CROSS_ENTROPY_BACKWARD, reference_backend(reference.cross_entropy_backward)],
    other=[reference_backend(reference.cross_entropy_backward)],
)  # fmt: skip


def _run(logits: Tensor, targets: Tensor, ignore_index: int, *rest: Any) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = _CROSS_ENTROPY.run(logits, targets, ignore_index, *rest)
    return result


def _checked_run(logits: Tensor, targets: Tensor, ignore_index: int, *rest: Any) -> tuple[Tensor, Tensor]:
    _check(logits, targets, ignore_index, *rest)
    checks.in_range(targets, logits.size(1), ignore_index)
    return _run(logits, targets, ignore_index, *rest)


def _fake(logits: Tensor, targets: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _check(logits, targets, *rest)
    rows = (logits.size(0),)
    return (
        logits.new_empty(rows, dtype=reference.widened(logits.dtype)),
        logits.new_empty(rows, dtype=torch.float64),
    )  # fmt: skip


def _fake_backward(grad_loss: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    _check_backward(grad_loss, logits, *rest)
    return logits.new_empty(logits.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, targets, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, targets, output[1])


def _backward(ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return None, None, None, None, None
    grad = torch.ops.llmkern.cross_entropy_backward(grad_loss, *ctx.saved_tensors, *ctx.options)
    return grad, None, None, None, None


def _vmap(batch_size: int, in_dims: tuple[int | None, ...], logits: Tensor, targets: Tensor, *rest: Any) -> Any:
    logits, targets = (samples(t, dim, batch_size) for t, dim in zip((logits, targets), in_dims[:2], strict=True))
    found = torch.ops.llmkern.cross_entropy(logits.reshape(-1, logits.size(-1)), targets.reshape(-1), *rest)
    return tuple(t.view(targets.shape) for t in found), (0, 0)


define(
    "cross_entropy(Tensor logits, Tensor targets, int ignore_index, float label_smoothing, float z_loss) "
    "-> (Tensor, Tensor)",
    _checked_run, _fake, setup_context=_setup, backward=_backward, vmap=_vmap,
)  # fmt: skip
define(
    "cross_entropy_backward(Tensor grad_loss, Tensor logits, Tensor targets, Tensor lse, int ignore_index, "
    "float label_smoothing, float z_loss) -> Tensor",
    _BACKWARD.run, _fake_backward, setup_context=setup,
    backward=backward_of(lambda *args: (reference.cross_entropy_backward(*args),)),
)  # fmt: skip
_CrossEntropy = short_autograd(_run, _setup, _backward)
