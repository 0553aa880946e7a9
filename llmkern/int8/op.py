"""torch.ops.llmkern.int8_linear: checks, backends, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern import autocast, check
from llmkern.backend import Operator, reference_backend
from llmkern.int8 import reference
from llmkern.int8.compiled import CPU_INT8_LINEAR
from llmkern.operator import call_key, define, dispatch, is_compiling, short_autograd


def int8_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ (weight_scale[:, None] * weight)^T + bias, x quantised to 8 bits for each row on the fly.

    x (..., K), float32, bfloat16 or float16. weight (N, K) int8. weight_scale (N,) float32. bias (N,), floating.
    Returns (..., N) in x's dtype, under autocast in autocast's. The integers are exact on every backend:
    llmkern.int8.reference defines them. A row that holds inf or NaN gives NaN. The gradient of x is that of the
    dequantised weight (straight through the rounding).

    Raises TypeError for a wrong dtype, ValueError for a wrong shape or device, or a weight_scale that requires a
    gradient. Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", section 2.
    """
    key = None if is_compiling() else call_key(x, weight, weight_scale, bias)
    if key is not None:
        launch = _SHORT.get(key) or _OPERATOR.short_call(key, _Int8Linear.apply, x, weight, weight_scale, bias)
        return launch(x, weight, weight_scale, bias)
    check.is_tensor("x", x)
    return dispatch("int8_linear", *autocast.cast(x), weight, weight_scale, bias)


def _check(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
    reference.check_linear(x, weight, weight_scale, bias)


def _example(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    weight = torch.empty(64, 64, dtype=torch.int8, device=device)
    return torch.empty(8, 64, dtype=dtype, device=device), weight, torch.empty(64, device=device), None


_OPERATOR = Operator(
    "int8_linear",
    _check,
    _example,
    cpu=[CPU_INT8_LINEAR, reference_backend(reference.int8_linear)],
    other=[reference_backend(reference.int8_linear)],
)
_SHORT = _OPERATOR.short


def _fake(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, weight, weight_scale, bias)
    return x.new_empty((*x.shape[:-1], weight.size(0)))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, weight_scale, bias = inputs
    if ctx.needs_input_grad[2]:
        raise ValueError("weight_scale: expected a tensor that requires no gradient, got one that does")
    ctx.save_for_backward(weight, weight_scale)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
    weight, weight_scale = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = ((grad.float() * weight_scale) @ weight.float()).to(grad.dtype)
    if ctx.needs_input_grad[3]:
        grad_bias = grad.unsqueeze(0).flatten(0, -2).float().sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, grad_bias


def _vmap(batch_size: int, in_dims: tuple[int | None, ...], x: Tensor, *rest: Any) -> Any:
    if in_dims[0] is None or any(d is not None for d in in_dims[1:]):
        return NotImplemented
    return torch.ops.llmkern.int8_linear(x.movedim(in_dims[0], 0), *rest), 0


define(
    "int8_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias) -> Tensor",
    _OPERATOR.run, _fake, setup_context=_setup_context, backward=_backward, vmap=_vmap,
)  # fmt: skip


_Int8Linear = short_autograd(_OPERATOR.run, _setup_context, _backward)
