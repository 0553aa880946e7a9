"""The Triton kernels of this family as backends: which calls they take, and how the arguments reach them.

Triton is imported when a call comes, never with the package.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmkern import triton
from llmkern.norm.compiled import chunks, outputs
from llmkern.rows import as_rows

if TYPE_CHECKING:
    from llmkern.inspect.triton_source import Compilation

MODULE = "llmkern.norm.triton_kernels"
#: The longest row: 32 elements for each of 512 threads in the forward, whose registers hold it once, and half as many
#: in the backward, which holds a row three times.
WIDEST = 16384
WIDEST_BACKWARD = 8192
#: Elements of a program's tile, at least: short rows come several at a time.
TILE = 2048
#: The fewest rows of a program of the backward, and the most programs: some for each SM of the largest GPUs.
CHUNKS = (8, 512)


def tile(width: int, threads_for: int) -> tuple[dict[str, int], dict[str, Any]]:
    """The rows and columns of a program, and Triton's options. threads_for: how many elements a thread may hold."""
    columns = max(triton.power_of_two(width), 16)
    rows = max(1, TILE // columns)
    warps = min(max(rows * columns // (32 * threads_for), 4), 16)
    # A product that is fused with the first addition of a sum over lanes is rounded on one side of it alone, so that
    # lanes end with different sums.
    return {"ROWS": rows, "COLUMNS": columns}, {"num_warps": warps, "enable_fp_fusion": False}


def norm(
    run: triton.Run, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float,
    offset: float, centred: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What op.norm takes, by norm_kernel, which `run` runs."""
    out, total, statistics = outputs(x, residual)
    if not out.numel():
        return out, total, statistics
    rows, added = as_rows(x), None if residual is None else as_rows(residual)
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    shape, options = tile(x.size(-1), 32)
    constants = {
        "CENTRED": centred, "HAS_RESIDUAL": added is not None, "HAS_WEIGHT": weight is not None,
        "HAS_BIAS": bias is not None, **shape,
    }  # fmt: skip
    arguments = (
        rows, rows if added is None else added, rows if weight is None else weight, rows if bias is None else bias,
        out, out if added is None else total, statistics, *rows.shape, rows.stride(0),
        0 if added is None else added.stride(0), float(eps), float(offset),
    )  # fmt: skip
    written = ("out", "statistics", *(() if added is None else ("total",)))
    grid = (-(-rows.size(0) // shape["ROWS"]),)
    run(triton.Launch(MODULE, "norm_kernel", grid, arguments, constants, options, written))
    return out, total, statistics


def norm_backward(
    run: triton.Run, grad: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor | None,
    statistics: Tensor, eps: float, offset: float, centred: bool, with_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What op.norm_backward takes, by norm_backward_kernel, which `run` runs."""
    dx = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    width = total.size(-1)
    count, block = chunks(dx.numel() // width if width else 0, *CHUNKS)
    weight_sums, bias_sums = (
        torch.empty((count, width), dtype=torch.float32, device=dx.device) if wanted else None
        for wanted in (weight is not None, with_bias)
    )
    if dx.numel():
        given, rows = as_rows(grad), as_rows(total)
        added = None if grad_total is None else as_rows(grad_total)
        shape, options = tile(width, 16)
        constants = {
            "CENTRED": centred, "HAS_TOTAL": added is not None, "HAS_WEIGHT": weight is not None,
            "HAS_BIAS": with_bias, **shape,
        }  # fmt: skip
        statistics = statistics.contiguous()
        arguments = (
            given, given if added is None else added, rows, rows if weight is None else weight.contiguous(),
            statistics, dx, statistics if weight_sums is None else weight_sums,
            statistics if bias_sums is None else bias_sums, *rows.shape, block, given.stride(0),
            0 if added is None else added.stride(0), rows.stride(0), float(offset),
        )  # fmt: skip
        sums = (("weight_sums", weight_sums), ("bias_sums", bias_sums))
        written = ("dx", *(name for name, t in sums if t is not None))
        run(triton.Launch(MODULE, "norm_backward_kernel", (count,), arguments, constants, options, written))
    empty = torch.empty(0, dtype=torch.float32, device=dx.device)
    dweight, dbias = (empty if s is None else s.sum(0) for s in (weight_sums, bias_sums))
    return dx, dweight, dbias


def limits(x: Tensor, widest: int) -> str | None:
    """Why a kernel cannot take rows of x, wherever it is."""
    return f"its kernel takes rows of up to {widest} elements, not {x.size(-1)}" if x.size(-1) > widest else None


TRITON_NORM = triton.served_by(norm, limits=lambda x, *args: limits(x, WIDEST))
TRITON_NORM_BACKWARD = triton.served_by(norm_backward, limits=lambda grad, *args: limits(grad, WIDEST_BACKWARD))


def examples(dtype: torch.dtype, width: int, centred: bool) -> Iterator[triton.Launch]:
    """The launches of a call with everything, forward and backward, without memory."""
    made: list[triton.Launch] = []
    x = torch.empty(4096, width, dtype=dtype, device="meta")
    weight = torch.empty(width, dtype=dtype, device="meta")
    bias = weight if centred else None
    statistics = torch.empty(4096, 2, device="meta")
    norm(made.append, x, x, weight, bias, 1e-5, 0.0, centred)
    if width <= WIDEST_BACKWARD:
        norm_backward(made.append, x, x, x, weight, statistics, 1e-5, 0.0, centred, centred)
    yield from made


def compilations() -> Iterator[Compilation]:
    """What `python -m llmkern inspect` compiles: rows of 4096 and of the widest, with residual and weights."""
    from llmkern.inspect.triton_source import Compilation

    widths = (4096, WIDEST_BACKWARD, WIDEST)
    rows = (*((torch.bfloat16, "bf16", n) for n in widths), *((torch.float32, "fp32", n) for n in widths[1:]))
    for (dtype, short, width), centred in itertools.product(rows, (True, False)):
        for launch in examples(dtype, width, centred):
            kind = "LayerNorm" if centred else "RMSNorm"
            yield Compilation.of(launch, f"{short}, {kind}, N={width}, {launch.options['num_warps']} warps")
