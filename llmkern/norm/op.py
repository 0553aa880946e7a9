"""torch.ops.llmkern.norm and norm_backward: checks, backends, autograd; layer_norm and rms_norm on top of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern import check
from llmkern.backend import Operator, reference_backend
from llmkern.norm import reference
from llmkern.norm.compiled import CPU_NORM, CPU_NORM_BACKWARD
from llmkern.norm.triton_launch import TRITON_NORM, TRITON_NORM_BACKWARD
from llmkern.operator import call_key, define, dispatch, is_compiling, samples, short_autograd
from llmkern.second_order import backward_of, setup


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *,
    residual: Tensor | None = None,
) -> Any:  # fmt: skip
    """(total - mean) / sqrt(variance + eps) * weight + bias over the last dimension, total = x or x + residual.

    x: (..., N), float32, bfloat16 or float16. weight, bias: (N,), in x's dtype or float32; without them 1 and 0.
    residual: x's shape and dtype. Returns x's shape and dtype; with a residual (out, total), both from one pass, where
    gradients flow through both. Statistics and sums are float32, whatever the dtype; a row's result has the same bits
    whatever stands beside it.

    Raises TypeError for a wrong dtype, ValueError for a wrong shape or device or an eps that is not finite. Source: Ba
    et al. 2016, "Layer Normalization", section 3.
    """
    return _call(x, residual, weight, bias, eps, 0.0, True)


def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, residual: Tensor | None = None, offset: float = 0.0
) -> Any:
    """total / sqrt(mean(total^2) + eps) * (offset + weight) over the last dimension, total = x or x + residual.

    As `layer_norm`, without a mean and a bias. offset: 1 for models that keep their weights around 0 (Gemma).

    Raises as `layer_norm`. Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", section 4.
    """
    return _call(x, residual, weight, None, eps, offset, False)


def _call(*args: Any) -> Any:
    for name, value in (("eps", args[4]), ("offset", args[5])):
        if type(value) is not float or value - value != 0.0:  # an ordinary number costs no check
            check.finite(name, value)
    found = None if is_compiling() else call_key(*args)
    if found is not None:
        launch = _NORM.short.get(found) or _NORM.short_call(found, _Norm.apply, *args)
        out, total, _ = launch(*args)
    else:
        out, total, _ = dispatch("norm", *args)
    return out if args[1] is None else (out, total)


def _check_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float,
    centred: bool,
) -> None:  # fmt: skip
    check.dtype("x", x, check.FLOATS)
    if x.dim() == 0:
        raise ValueError("x: expected (..., N), got shape ()")
    if residual is not None:
        check.same_dtype("residual", residual, "x", x)
        check.same_device("residual", residual, "x", x)
        check.shape("residual", residual, "the shape of x", tuple(x.shape))
    _check_weights(x, weight, bias)


def _check_weights(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            check.dtype(name, t, (torch.float32,) if x.dtype == torch.float32 else (x.dtype, torch.float32))
            check.same_device(name, t, "x", x)
            check.shape(name, t, "(N,)", (x.size(-1),))
    if weight is not None and bias is not None:
        check.same_dtype("bias", bias, "weight", weight)


def _check_backward(
    grad: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor | None, statistics: Tensor, eps: float,
    offset: float, centred: bool, with_bias: bool,
) -> None:  # fmt: skip
    check.dtype("total", total, check.FLOATS)
    if total.dim() == 0:
        raise ValueError("total: expected (..., N), got shape ()")
    for name, t in (("grad", grad), ("grad_total", grad_total)):
        if t is not None:
            check.same_dtype(name, t, "total", total)
            check.same_device(name, t, "total", total)
            check.shape(name, t, "the shape of total", tuple(total.shape))
    check.dtype("statistics", statistics, (torch.float32,))
    check.same_device("statistics", statistics, "total", total)
    check.shape("statistics", statistics, "(..., 2)", (*total.shape[:-1], 2))
    _check_weights(total, weight, None)


def _example(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    x, weight = torch.empty(8, 64, dtype=dtype, device=device), torch.empty(64, dtype=dtype, device=device)
    return x, x, weight, weight, 1e-5, 0.0, True


def _backward_example(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    x, weight = torch.empty(8, 64, dtype=dtype, device=device), torch.empty(64, dtype=dtype, device=device)
    return x, x, x, weight, torch.empty(8, 2, device=device), 1e-5, 0.0, True, True


_NORM = Operator(
    "norm", _check_norm, _example,
    cpu=[CPU_NORM, reference_backend(reference.norm)],
    cuda=[TRITON_NORM, reference_backend(reference.norm)],
    other=[reference_backend(reference.norm)],
)  # fmt: skip
_BACKWARD = Operator(
    "norm_backward", _check_backward, _backward_example,
    cpu=[CPU_NORM_BACKWARD, reference_backend(reference.norm_backward)],
    cuda=[TRITON_NORM_BACKWARD, reference_backend(reference.norm_backward)],
    other=[reference_backend(reference.norm_backward)],
)  # fmt: skip


def _fake_norm(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    _check_norm(x, residual, *rest)
    return (
        x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape),
        x.new_empty((*x.shape[:-1], 2), dtype=torch.float32),
    )  # fmt: skip


def _fake_backward(
    grad: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor | None, statistics: Tensor, eps: float,
    offset: float, centred: bool, with_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _check_backward(grad, grad_total, total, weight, statistics, eps, offset, centred, with_bias)
    width = total.size(-1)
    widths = (width if wanted else 0 for wanted in (weight is not None, with_bias))
    dweight, dbias = (total.new_empty(n, dtype=torch.float32) for n in widths)
    return total.new_empty(total.shape), dweight, dbias


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, residual, weight, bias, ctx.eps, ctx.offset, ctx.centred = inputs
    _, total, statistics = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(statistics, *([total] if residual is None else []))
    ctx.bias_dtype, ctx.shape = None if bias is None else bias.dtype, x.shape
    ctx.save_for_backward(x if residual is None else total, weight, statistics)


def _backward(
    ctx: Any, grad: Tensor | None, grad_total: Tensor | None, grad_statistics: Tensor | None
) -> tuple[Tensor | None, ...]:
    total, weight, statistics = ctx.saved_tensors
    needed = ctx.needs_input_grad
    if grad is None:  # only the total went on
        dx, dweight, dbias = grad_total, None, None
    else:
        dx, dweight, dbias = torch.ops.llmkern.norm_backward(
            grad, grad_total, total, weight, statistics, ctx.eps, ctx.offset, ctx.centred, ctx.bias_dtype is not None
        )
    return (
        dx if needed[0] else None, dx if needed[1] else None,
        dweight.to(weight.dtype) if dweight is not None and needed[2] else None,
        dbias.to(ctx.bias_dtype) if dbias is not None and needed[3] else None,
        None, None, None,
    )  # fmt: skip


def _vmap(batch_size: int, in_dims: tuple[int | None, ...], x: Tensor, residual: Tensor | None, *rest: Any) -> Any:
    if in_dims[2] is not None or in_dims[3] is not None:  # weights of each sample's own
        return NotImplemented
    given = (t if t is None else samples(t, dim, batch_size) for t, dim in ((x, in_dims[0]), (residual, in_dims[1])))
    return torch.ops.llmkern.norm(*given, *rest), (0, None if residual is None else 0, 0)


define(
    "norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, float offset, bool centred) "
    "-> (Tensor, Tensor, Tensor)",
    _NORM.run, _fake_norm, setup_context=_setup, backward=_backward, vmap=_vmap,
)  # fmt: skip
define(
    "norm_backward(Tensor grad, Tensor? grad_total, Tensor total, Tensor? weight, Tensor statistics, float eps, "
    "float offset, bool centred, bool with_bias) -> (Tensor, Tensor, Tensor)",
    _BACKWARD.run, _fake_backward, setup_context=setup, backward=backward_of(reference.norm_backward_of_total),
)  # fmt: skip
_Norm = short_autograd(_NORM.run, _setup, _backward)
