"""The Triton kernels of this family as backends: which calls they take, and how the arguments reach them.

Triton is imported when a call comes, never with the package.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmkern.backend import Backend
from llmkern.positional.compiled import rotary_output, side_by_side

if TYPE_CHECKING:
    from llmkern.inspect.triton_source import Compilation

#: Elements of a program's tile: 32 a thread with 4 warps keeps everything in registers at full occupancy.
TILE = 4096
WARPS = 4


@lru_cache(maxsize=1)
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: `pip install triton`"
    return None


def _unsupported(q: Tensor, *args: Any) -> str | None:
    if q.device.type != "cuda":
        return f"the tensors are on {q.device}, not on a GPU"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return _missing()


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def constants(
    width: int, half: int, heads: int, interleaved: bool, inverse: bool, has_ids: bool, inplace: bool
) -> dict[str, Any]:
    """The compile-time arguments of rotary_kernel for a head of `width` elements, 2 * half of them rotated."""
    rest = width - 2 * half
    half_block = max(_power_of_two(half), 1)
    per_program = max(1, min(_power_of_two(heads), TILE // (2 * half_block)))
    return {
        "HALF": half,
        "INTERLEAVED": interleaved,
        "INVERSE": inverse,
        "HAS_IDS": has_ids,
        "INPLACE": inplace,
        "HEADS": per_program,
        "HALF_BLOCK": half_block,
        "REST_BLOCK": _power_of_two(rest) if rest else 0,
    }


def launch(
    kernel: Any, q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, position_ids: Tensor | None,
    interleaved: bool, inverse: bool, inplace: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Runs `kernel`, which is rotary_kernel compiled or interpreted, on what op.rotary takes."""
    if not all(x is None or side_by_side(x) for x in (q, k, cos, sin)):
        q_c, k_c = q.contiguous(), None if k is None else k.contiguous()
        out = launch(kernel, q_c, k_c, cos.contiguous(), sin.contiguous(), position_ids, interleaved, inverse, False)
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
    kernel[grid](
        q, k_in, q_out, k_to, cos, sin, cos if position_ids is None else position_ids,
        heads, kv_heads, width, cos.size(0), *q.stride()[:3], *k_in.stride()[:3], *q_out.stride()[:3],
        *k_to.stride()[:3], cos.stride(0), sin.stride(0), *ids_strides, **constant,
        num_warps=WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    return q_out, k_out


def _rotary(*args: Any) -> Callable[..., tuple[Tensor, Tensor | None]]:
    from llmkern.positional.triton_kernels import rotary_kernel

    def run(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor | None]:
        with torch.cuda.device(q.device):  # Triton launches on the current device
            return launch(rotary_kernel, q, *rest)

    return run


TRITON_ROTARY = Backend("triton", _rotary, _unsupported)


def compilations() -> Iterator[Compilation]:
    """What `python -m llmkern inspect` compiles: heads of 128, all rotated, aligned tensors and strides."""
    from llmkern.inspect.triton_source import Compilation
    from llmkern.positional.triton_kernels import rotary_kernel

    pointers = ("q", "k", "q_out", "k_out", "cos", "sin", "position_ids")
    for dtype, interleaved in itertools.product(("fp32", "bf16"), (False, True)):
        constant = constants(128, 64, 32, interleaved, False, False, False)
        types = {name: "i32" for name in rotary_kernel.arg_names if name not in constant}
        types |= dict.fromkeys(pointers, f"*{dtype}") | {"cos": "*fp32", "sin": "*fp32", "position_ids": "*i64"}
        strides = [name for name in types if name.endswith(("_b", "_h", "_s"))]
        yield Compilation(
            rotary_kernel, f"{dtype}, {'interleaved' if interleaved else 'half-split'}, D=128", types, constant,
            [*pointers, *strides], {"num_warps": WARPS, "enable_fp_fusion": True},
        )  # fmt: skip
