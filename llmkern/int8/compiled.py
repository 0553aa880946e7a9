"""The CPU kernel of int8_linear (csrc/int8/cpu.cpp) as a backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llmkern import check, extension
from llmkern.backend import Backend
from llmkern.int8.packing import layout_of, packed, transposed
from llmkern.int8.scheme import ACTIVATIONS, INPUTS, PAIRS

#: A sum of K products of 0..255 and -128..127 stays within int32 up to here.
MOST_DEPTH = (2**31 - 1) // (255 * 128)


def refused(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, *rest: Any) -> str | None:
    """Why no kernel, of whatever device, can serve a call."""
    for name, tensor in (("x", x), ("bias", bias)):
        if tensor is not None and tensor.dtype not in check.FLOATS:
            return f"{name} is {tensor.dtype}, not float32, bfloat16 or float16"
    if weight.size(1) > MOST_DEPTH:
        return f"K = {weight.size(1)} is above {MOST_DEPTH}, past which its int32 sums could overflow"
    return None


def _unsupported(x: Tensor, *args: Any) -> str | None:
    if extension.MISSING:
        return extension.MISSING
    if x.device.type != "cpu":
        return f"x is on {x.device}, not on the CPU"
    return refused(x, *args)


def _plan(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, residual: Tensor | None,
    input_scale: Tensor | None, inputs: str, group: int, rotate: int, activation: str, out: Tensor | None = None,
) -> Callable[..., Tensor]:  # fmt: skip
    kernel, threads, isa = extension._C.int8_linear, extension.threads, extension._C.active_isa()
    rows_of = [None if t is None else row_distance(t) for t in (x, residual, out)]
    vectors_dense = all(t is None or t.stride(0) == 1 or t.size(0) <= 1 for t in (bias, input_scale))
    if not group:
        vectors_dense = vectors_dense and (weight_scale.stride(0) == 1 or weight_scale.size(0) <= 1)
    if -1 in rows_of or not vectors_dense:
        return on_copies(_plan)
    dtype, pairs = x.dtype, activation in PAIRS
    plan, shape = kernel_plan(x, weight, bias, rows_of, inputs, group, rotate, activation, out)
    strides = torch.empty(shape, device="meta").stride()
    empty = torch.empty_strided  # quicker than torch.empty
    layout, scale_layout = layout_of(weight), layout_of(weight_scale)
    if out is None and residual is None and input_scale is None and not group and not pairs:

        def plain(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
            out = empty(shape, strides, dtype=dtype)
            kernel(plan, threads(), x, packed(weight, layout, isa), weight_scale, bias, None, None, out)
            return out

        return plain

    def launch(
        x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, residual: Tensor | None,
        input_scale: Tensor | None, inputs: str, group: int, rotate: int, activation: str, out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if out is None:
            out = empty(shape, strides, dtype=dtype)
        scale = transposed(weight_scale, scale_layout) if group else weight_scale
        kernel(plan, threads(), x, packed(weight, layout, isa, group, pairs), scale, bias, residual, input_scale, out)
        return out

    return launch


def kernel_plan(
    x: Tensor, weight: Tensor, bias: Tensor | None, distances: Sequence[int | None], inputs: str, group: int,
    rotate: int, activation: str, out: Tensor | None,
) -> tuple[Any, tuple[int, ...]]:  # fmt: skip
    """What the kernels of every device are told of a call, and the shape of the result.

    distances: of the rows of x, residual and out (row_distance); None where there is no such tensor.
    """
    outputs, depth = weight.shape
    shape = (*x.shape[:-1], outputs // 2 if activation in PAIRS else outputs)
    codes = extension.DTYPE_CODES
    plan = extension._C.Int8LinearPlan(
        rows=math.prod(x.shape[:-1]), outputs=outputs, depth=depth, x_stride=distances[0],
        residual_stride=distances[1] or 0, out_stride=shape[-1] if out is None else distances[2],
        quantization=extension._C.Quantization(INPUTS[inputs], inputs == "outliers", group, rotate),
        activation=ACTIVATIONS[activation], dtype=codes[x.dtype], bias_dtype=0 if bias is None else codes[bias.dtype],
    )  # fmt: skip
    return plan, shape


def row_distance(x: Tensor) -> int:
    """The distance of the rows of x as one matrix, or -1 where its elements do not lie in such rows."""
    if not x.numel():
        return x.size(-1)
    if x.stride(-1) != 1 and x.size(-1) != 1:
        return -1
    row, expected = None, 0
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if row is None:
            row = stride
        elif stride != expected:
            return -1
        expected = stride * size
    return x.size(-1) if row is None else row


def on_copies(plan: Callable[..., Callable[..., Tensor]]) -> Callable[..., Tensor]:
    """A launcher that gives `plan` dense copies of what its kernel cannot read as it lies."""

    def launch(
        x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, residual: Tensor | None,
        input_scale: Tensor | None, inputs: str, group: int, rotate: int, activation: str, out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        dense = [None if t is None else t.contiguous() for t in (bias, residual, input_scale)]
        if not group:
            weight_scale = weight_scale.contiguous()
        args: tuple[Any, ...] = (x.contiguous(), weight, weight_scale, *dense, inputs, group, rotate, activation)
        if out is None or row_distance(out) >= 0:
            args = (*args, out)
            return plan(*args)(*args)
        return out.copy_(plan(*args)(*args))

    return launch


#: int8_linear(x, weight, weight_scale, bias, residual, input_scale, inputs, group, rotate, activation[, out]) -> y
CPU_INT8_LINEAR = Backend("cpu", _plan, _unsupported)
