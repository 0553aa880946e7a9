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
from llmkern.positional.compiled import rotary_output, side_by_side
from llmkern.random import drop_below

if TYPE_CHECKING:
    from llmkern.inspect.triton_source import Compilation

#: Elements of a program's tile: 32 a thread with 4 warps keeps everything in registers at full occupancy.
TILE = 4096
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
MODULE = "llmkern.positional.triton_kernels"
#: The same of the sinusoidal add, whose dropout has four random words of its own for each four elements.
ADD_TILE = 2048
MOST = 65535  #: programs along the second and third axis of a grid, of CUDA and of HIP


def constants(
    width: int, half: int, heads: int, interleaved: bool, inverse: bool, has_ids: bool, inplace: bool
) -> dict[str, Any]:
    """The compile-time arguments of rotary_kernel for a head of `width` elements, 2 * half of them rotated."""
    rest = width - 2 * half
    half_block = max(triton.power_of_two(half), 1)
    per_program = max(1, min(triton.power_of_two(heads), TILE // (2 * half_block)))
    return {
        "HALF": half,
        "INTERLEAVED": interleaved,
        "INVERSE": inverse,
        "HAS_IDS": has_ids,
        "INPLACE": inplace,
        "HEADS": per_program,
        "HALF_BLOCK": half_block,
        "REST_BLOCK": triton.power_of_two(rest) if rest else 0,
    }


def rotary(
    run: triton.Run, q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, position_ids: Tensor | None,
    interleaved: bool, inverse: bool, inplace: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """What op.rotary takes, by rotary_kernel, which `run` runs."""
    if not all(x is None or side_by_side(x) for x in (q, k, cos, sin)):
        q_c, k_c = q.contiguous(), None if k is None else k.contiguous()
        out = rotary(run, q_c, k_c, cos.contiguous(), sin.contiguous(), position_ids, interleaved, inverse, False)
        if not inplace:
            return out
        return q.copy_(out[0]), None if k is None or out[1] is None else k.copy_(out[1])
    q_out, k_out = (q, k) if inplace else (rotary_output(q), None if k is None else rotary_output(k))
    batch, heads, length, width = q.shape
    kv_heads = 0 if k is None else k.size(1)
    if not (batch and length and heads + kv_heads and width):
        return q_out, k_out
    constant = constants(
        width, cos.size(1), max(heads, kv_heads), interleaved, inverse, position_ids is not None, inplace
    )
    per_program = constant["HEADS"]
    grid = (length, batch, -(-heads // per_program) + -(-kv_heads // per_program))
    ids_strides = (0, 0)
    if position_ids is not None:
        ids_strides = (position_ids.stride(0) if position_ids.dim() == 2 else 0, position_ids.stride(-1))
    k_in, k_to = (q, q_out) if k is None or k_out is None else (k, k_out)  # not touched without kv_heads
    arguments = (
        q, k_in, q_out, k_to, cos, sin, cos if position_ids is None else position_ids,
        heads, kv_heads, width, cos.size(0), *q.stride()[:3], *k_in.stride()[:3], *q_out.stride()[:3],
        *k_to.stride()[:3], cos.stride(0), sin.stride(0), *ids_strides,
    )  # fmt: skip
    written = () if inplace else ("q_out", "k_out")
    run(triton.Launch(MODULE, "rotary_kernel", grid, arguments, constant, OPTIONS, written))
    return q_out, k_out


def sinusoidal_constants(width: int, has_pe: bool, dropout: bool) -> dict[str, Any]:
    """The compile-time arguments of sinusoidal_add_kernel for rows of `width` elements."""
    columns = min(max(triton.power_of_two(width), 16), 1024)
    return {"HAS_PE": has_pe, "DROPOUT": dropout, "ROWS": ADD_TILE // columns, "COLUMNS": columns}


def sinusoidal_add(
    run: triton.Run, x: Tensor, pe: Tensor | None, seed: Tensor | None, scale: float, dropout_p: float
) -> Tensor:
    """What op.sinusoidal_add takes, by sinusoidal_add_kernel, which `run` runs; pe None stands for zeros."""
    if not all(t is None or side_by_side(t) for t in (x, pe)):
        x, pe = x.contiguous(), None if pe is None else pe.contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    length, batch, width = x.shape
    if not x.numel():
        return out
    constant = sinusoidal_constants(width, pe is not None, seed is not None and dropout_p > 0.0)
    grid = (-(-length * batch // constant["ROWS"]), -(-width // constant["COLUMNS"]))
    arguments = (
        x, x if pe is None else pe, out, length * batch, batch, width, *x.stride()[:2],
        0 if pe is None else pe.stride(0), *out.stride()[:2], scale, 0 if seed is None else int(seed),
        drop_below(dropout_p), 0.0 if dropout_p >= 1.0 else 1.0 / (1.0 - dropout_p),
    )  # fmt: skip
    run(triton.Launch(MODULE, "sinusoidal_add_kernel", grid, arguments, constant, OPTIONS, ("out",)))
    return out


def rotary_limits(q: Tensor, *args: Any) -> str | None:
    """Why a grid cannot hold a call's batch."""
    return f"its kernel takes a batch of up to {MOST}, not {q.size(0)}" if q.size(0) > MOST else None


def sinusoidal_limits(x: Tensor, *args: Any) -> str | None:
    """Why a grid cannot hold a call's rows."""
    widest = MOST * 1024
    return f"its kernel takes rows of up to {widest} elements, not {x.size(2)}" if x.size(2) > widest else None


TRITON_ROTARY = triton.served_by(rotary, limits=rotary_limits)
TRITON_SINUSOIDAL_ADD = triton.served_by(sinusoidal_add, limits=sinusoidal_limits)
TRITON_SINUSOIDAL_DROPOUT = triton.served_by(sinusoidal_add, None, limits=sinusoidal_limits)


def compilations() -> Iterator[Compilation]:
    """What `python -m llmkern inspect` compiles, with aligned tensors and strides: rotary of heads of 128, all rotated,
    and the sinusoidal add to rows of 1024."""
    from llmkern.inspect.triton_source import Compilation
    from llmkern.positional.triton_kernels import rotary_kernel, sinusoidal_add_kernel

    pointers = ("q", "k", "q_out", "k_out", "cos", "sin", "position_ids")
    for dtype, interleaved in itertools.product(("fp32", "bf16"), (False, True)):
        constant = constants(128, 64, 32, interleaved, False, False, False)
        types = {name: "i32" for name in rotary_kernel.arg_names if name not in constant}
        types |= dict.fromkeys(pointers, f"*{dtype}") | {"cos": "*fp32", "sin": "*fp32", "position_ids": "*i64"}
        strides = [name for name in types if name.endswith(("_b", "_h", "_s"))]
        yield Compilation(
            rotary_kernel, f"{dtype}, {'interleaved' if interleaved else 'half-split'}, D=128", types, constant,
            [*pointers, *strides], OPTIONS,
        )  # fmt: skip
    for dtype, dropout in itertools.product(("fp32", "bf16"), (False, True)):
        constant = sinusoidal_constants(1024, True, dropout)
        types = {name: "i32" for name in sinusoidal_add_kernel.arg_names if name not in constant}
        types |= {"x": f"*{dtype}", "pe": "*fp32", "out": f"*{dtype}", "scale": "fp32", "keep_scale": "fp32"}
        types |= {"seed": "i64", "drop_below": "i64"}
        yield Compilation(
            sinusoidal_add_kernel, f"{dtype}, {'dropout' if dropout else 'no dropout'}", types, constant,
            ["x", "pe", "out", "width", "x_s", "x_b", "pe_s", "out_s", "out_b"],
            OPTIONS,
        )  # fmt: skip
