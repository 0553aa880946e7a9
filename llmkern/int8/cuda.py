"""The CUDA kernels of int8_linear (csrc/int8/cuda*.cu) as a backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmkern import cuda
from llmkern.backend import Backend
from llmkern.extension import address
from llmkern.int8.compiled import kernel_plan, on_copies, refused, row_distance
from llmkern.int8.packing import layout_of, rows_of_16, sums_over_k

#: As kMostRowBytes in csrc/int8/cuda.h.
MOST_ROW_BYTES = 96 * 1024


def _refused(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, residual: Tensor | None,
    input_scale: Tensor | None, inputs: str, group: int, rotate: int, activation: str, out: Tensor | None = None,
) -> str | None:  # fmt: skip
    """Why the kernels cannot serve a call on a machine that runs them."""
    if rotate > 1:
        return f"rotate={rotate}: the CUDA kernels have no Hadamard transform"
    if group and inputs != "symmetric":
        return f"inputs={inputs!r} with group={group}: the CUDA kernels take groups of 'symmetric' inputs alone"
    reason = refused(x, weight, weight_scale, bias)
    if reason:
        return reason
    depth = weight.size(1)
    # A block for each row of x, and one for some outputs. The grid of tiles is smaller than `out` by more than 2^12.
    rows = max(math.prod(x.shape[:-1]), weight.size(0))
    if rows > cuda.MOST_BLOCKS:
        return f"its kernels take up to 2^31 - 1 rows of x and of the weight, not {rows}"
    held = -(-depth // 64) * 64 * x.element_size() + (4 * -(-depth // group) if group else 0)
    if held > MOST_ROW_BYTES:
        return f"a row of x and its scales take {held} bytes, more than the {MOST_ROW_BYTES} that a block holds"
    return None


def _unsupported(x: Tensor, *args: Any) -> str | None:
    return cuda.unsupported(x) or _refused(x, *args)


def _plan(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, residual: Tensor | None,
    input_scale: Tensor | None, inputs: str, group: int, rotate: int, activation: str, out: Tensor | None = None,
) -> Callable[..., Tensor]:  # fmt: skip
    distances = [None if t is None else row_distance(t) for t in (x, residual, out)]
    vectors = (bias, input_scale)
    if -1 in distances or not all(t is None or t.stride(0) == 1 or t.size(0) <= 1 for t in vectors):
        return on_copies(_plan)
    kernel, device = cuda.kernel("int8_linear_cuda"), x.device
    dtype = x.dtype
    plan, shape = kernel_plan(x, weight, bias, distances, inputs, group, rotate, activation, out)
    bytes_of: Callable[..., Any] = cuda.kernel("int8_workspace_cuda")
    workspace = bytes_of(plan)
    sm90 = cuda.is_hopper(device) and cuda.kernel("int8_sm90_unsupported")(plan) is None
    layout, scale_strides = layout_of(weight), (*weight_scale.stride(), 0)[:2]

    def launch(
        x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, residual: Tensor | None,
        input_scale: Tensor | None, inputs: str, group: int, rotate: int, activation: str, out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if out is None:
            out = torch.empty(shape, dtype=dtype, device=device)
        digits = torch.empty(workspace, dtype=torch.uint8, device=device)
        aligned = rows_of_16(weight, layout)
        sums = None if group else sums_over_k(weight, layout)
        kernel(
            plan, x.data_ptr(), aligned.data_ptr(), aligned.stride(0), address(sums), weight_scale.data_ptr(),
            *scale_strides, address(bias), address(residual), address(input_scale), out.data_ptr(),
            digits.data_ptr(), *cuda.stream(device), sm90,
        )  # fmt: skip
        return out

    return launch


#: int8_linear(x, weight, weight_scale, bias, residual, input_scale, inputs, group, rotate, activation[, out]) -> y
CUDA_INT8_LINEAR = Backend("cuda", _plan, _unsupported)
