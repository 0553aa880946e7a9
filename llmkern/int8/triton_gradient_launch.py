"""The Triton kernel of int8_linear_backward as a backend: which calls it takes, and how the arguments reach it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmkern import check, triton
from llmkern.backend import Backend
from llmkern.int8 import triton_configurations
from llmkern.int8.compiled import row_distance
from llmkern.int8.triton_launch import hadamard, rotation_refused

if TYPE_CHECKING:
    from llmkern.inspect.triton_source import Compilation


def _refused(grad: Tensor, weight: Tensor, weight_scale: Tensor, group: int, rotate: int) -> str | None:
    """Why the kernel cannot serve a call on a machine that runs it."""
    if grad.dtype not in check.FLOATS:
        return f"grad is {grad.dtype}: the Triton kernel takes float32, bfloat16 and float16"
    return rotation_refused(rotate)


def _unsupported(grad: Tensor, *args: Any) -> str | None:
    return triton.unsupported(grad) or _refused(grad, *args)


def plan(run: triton.Run, grad: Tensor, weight: Tensor, *rest: Any) -> Callable[..., Tensor]:
    """A launcher for calls with the metadata of these arguments, whose kernels `run` runs."""
    _, group, _ = rest
    outputs, depth = weight.shape
    rows, shape, device, dtype = math.prod(grad.shape[:-1]), (*grad.shape[:-1], depth), grad.device, grad.dtype
    dense = row_distance(grad) >= 0
    distance = row_distance(grad) if dense else outputs
    tile = triton_configurations.gradient_tile(rows, group, dtype == torch.float32)
    programs = -(-rows // tile.rows) * -(-depth // tile.columns)
    constants = {
        "GROUP": group, "TERMS": 3 if dtype == torch.float32 else 2, "ROWS": tile.rows, "COLUMNS": tile.columns,
        "DEPTH": tile.depth, "ABREAST": 8,
    }  # fmt: skip

    def launch(grad: Tensor, weight: Tensor, weight_scale: Tensor, group: int, rotate: int) -> Tensor:
        out = torch.empty(shape, dtype=dtype, device=device)
        if not (rows and depth):
            return out
        grad = grad if dense else grad.contiguous()
        along = weight if weight.stride(1) == 1 or depth <= 1 else weight.contiguous()
        product = out if rotate == 1 else torch.empty(rows, depth, dtype=torch.float32, device=device)
        run(triton.Launch(
            "llmkern.int8.triton_gradient", "gradient_kernel", (programs,),
            (grad, along, weight_scale, product, rows, outputs, depth, distance, along.stride(0),
             *(*weight_scale.stride(), 0)[:2], depth),
            constants, {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": False}, ("out",),
        ))  # fmt: skip
        if rotate > 1:
            run(hadamard(product, out.view(rows, depth), depth, rotate))
        return out

    return launch


def _plan(*args: Any) -> Callable[..., Tensor]:
    return plan(triton.run, *args)


#: int8_linear_backward(grad, weight, weight_scale, group, rotate) -> grad_x
TRITON_INT8_LINEAR_BACKWARD = Backend("triton", _plan, _unsupported)


def compilations() -> Iterator[Compilation]:
    """For the inspector: each line of the table of tiles, in bfloat16, and float32."""
    from llmkern.inspect.limits import TARGETS
    from llmkern.inspect.triton_source import Compilation

    for rows, dtype, group in (
        (8, torch.bfloat16, 0), (512, torch.bfloat16, 0), (512, torch.bfloat16, 128), (512, torch.float32, 0),
    ):  # fmt: skip
        grad = torch.empty(rows, 4096, device="meta", dtype=dtype)
        weight = torch.empty(4096, 4096, device="meta", dtype=torch.int8)
        scale = torch.empty((4096, 32) if group else (4096,), device="meta")
        launches: list[triton.Launch] = []
        plan(launches.append, grad, weight, scale, group, 1)(grad, weight, scale, group, 1)
        config = f"{str(dtype).removeprefix('torch.')}, {group or 'no groups'}, M={rows}"
        yield Compilation.of(launches[0], config, (*TARGETS, "gfx942"))  # the largest tile would spill on gfx1100
