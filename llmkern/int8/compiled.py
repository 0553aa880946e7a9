"""The CPU kernel of int8_linear (csrc/int8/cpu.cpp) as a backend."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmkern import extension
from llmkern.backend import Backend
from llmkern.int8.packing import packed

#: A sum of K products of 0..255 and -128..127 stays within int32 up to here.
MOST_DEPTH = (2**31 - 1) // (255 * 128)


def _unsupported(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> str | None:
    if extension.MISSING:
        return extension.MISSING
    if x.device.type != "cpu":
        return f"x is on {x.device}, not on the CPU"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"x is {x.dtype}, not float32, bfloat16 or float16"
    if bias is not None and bias.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"bias is {bias.dtype}, not float32, bfloat16 or float16"
    if weight.size(1) > MOST_DEPTH:
        return f"K = {weight.size(1)} is above {MOST_DEPTH}, past which its int32 sums could overflow"
    return None


def _row_stride(x: Tensor) -> int | None:
    """The distance of the rows of x as one matrix (M, K), or None where there is no single one."""
    if x.dim() == 1:
        return x.size(0)
    row: int | None = None
    expected = 0
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if row is None:
            row = stride
        elif stride != expected:
            return None
        expected = stride * size
    return x.size(-1) if row is None else row


def _plan(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Callable[..., Tensor]:
    kernel, threads, isa = extension._C.int8_linear, extension.threads, extension._C.active_isa()
    row_stride = _row_stride(x) if x.numel() else x.size(-1)
    rows_dense = x.stride(-1) == 1 or x.size(-1) == 1 or x.numel() == 0
    vectors_dense = all(t is None or t.stride(0) == 1 or t.size(0) <= 1 for t in (weight_scale, bias))
    if row_stride is None or not rows_dense or not vectors_dense:
        return _on_copies
    outputs, depth = weight.shape
    shape = (*x.shape[:-1], outputs)
    rows = 1
    for size in x.shape[:-1]:
        rows *= size
    dtype, codes = x.dtype, extension.DTYPE_CODES
    bias_code = 0 if bias is None else codes[bias.dtype]
    plan = extension._C.Int8LinearPlan(rows, outputs, depth, row_stride, codes[dtype], bias_code)
    strides = torch.empty(shape, device="meta").stride()
    empty = torch.empty_strided  # quicker than torch.empty

    def launch(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
        out = empty(shape, strides, dtype=dtype)
        kernel(plan, threads(), x, packed(weight, isa), weight_scale, bias, out)
        return out

    return launch


def _on_copies(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    args = (x.contiguous(), weight, weight_scale.contiguous(), None if bias is None else bias.contiguous())
    return _plan(*args)(*args)


#: int8_linear(x, weight, weight_scale, bias) -> y
CPU_INT8_LINEAR = Backend("cpu", _plan, _unsupported)
