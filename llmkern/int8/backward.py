"""torch.ops.llmkern.int8_linear_backward, the gradient of int8_linear's input: checks, backends, its own gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern import check
from llmkern.backend import Backend, Operator, reference_backend
from llmkern.int8 import reference
from llmkern.int8.triton_gradient_launch import TRITON_INT8_LINEAR_BACKWARD
from llmkern.operator import define


def input_gradient(grad: Tensor, weight: Tensor, weight_scale: Tensor, group: int, rotate: int) -> Tensor:
    """grad (..., N) times the dequantised weight (N, K), rotated back: (..., K) in grad's dtype, float32, bfloat16 or
    float16. weight int8, weight_scale float32, group and rotate: as those of int8_linear, whose gradient goes straight
    through the rounding. Raises as int8_linear does."""
    result: Tensor = torch.ops.llmkern.int8_linear_backward(grad, weight, weight_scale, group, rotate)
    return result


def _check(grad: Tensor, weight: Tensor, weight_scale: Tensor, group: int, rotate: int) -> None:
    """What int8_linear checks, of an x that would have such a result."""
    check.rank("weight", weight, "(N, K)")
    if grad.dim() < 1 or grad.size(-1) != weight.size(0):
        raise ValueError(f"grad: expected (..., N) with N = {weight.size(0)} as in weight, got {tuple(grad.shape)}")
    check.dtype("grad", grad, check.FLOATS)
    x = grad.new_empty(()).expand(*grad.shape[:-1], weight.size(1))
    reference.check_linear(x, weight, weight_scale, None, None, None, "row" if group else "outliers", group, rotate)


def _example(device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    weight = torch.empty(64, 64, dtype=torch.int8, device=device)
    return torch.empty(8, 64, dtype=dtype, device=device), weight, torch.empty(64, device=device), 0, 1


#: On a processor torch's own product is the kernel: it is in float32, where 8 bits of the weight gain nothing.
_CPU = Backend("cpu", lambda *args: reference.input_gradient, lambda *args: None)
_OPERATOR = Operator(
    "int8_linear_backward",
    _check,
    _example,
    cpu=[_CPU, reference_backend(reference.input_gradient)],
    cuda=[TRITON_INT8_LINEAR_BACKWARD, reference_backend(reference.input_gradient)],
    other=[reference_backend(reference.input_gradient)],
)


def _fake(grad: Tensor, weight: Tensor, weight_scale: Tensor, group: int, rotate: int) -> Tensor:
    _check(grad, weight, weight_scale, group, rotate)
    return grad.new_empty((*grad.shape[:-1], weight.size(1)))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, weight_scale, ctx.group, ctx.rotate = inputs
    ctx.save_for_backward(weight, weight_scale)


def _backward(ctx: Any, grad_x: Tensor) -> tuple[Tensor | None, ...]:
    """It is linear in grad: the product with the dequantised weight transposed."""
    weight, weight_scale = ctx.saved_tensors
    wide = reference.hadamard(grad_x.float(), ctx.rotate)
    dequantized = reference.dequantize_weight(weight, weight_scale, ctx.group)
    return (wide @ dequantized.t()).to(grad_x.dtype), None, None, None, None


def _vmap(batch_size: int, in_dims: tuple[int | None, ...], grad: Tensor, *rest: Any) -> Any:
    if in_dims[0] is None or any(d is not None for d in in_dims[1:]):
        return NotImplemented
    return torch.ops.llmkern.int8_linear_backward(grad.movedim(in_dims[0], 0), *rest), 0


define(
    "int8_linear_backward(Tensor grad, Tensor weight, Tensor weight_scale, int group, int rotate) -> Tensor",
    _OPERATOR.run, _fake, setup_context=_setup_context, backward=_backward, vmap=_vmap,
)  # fmt: skip
