"""The Triton kernels of this family as backends: which calls they take, and how the arguments reach them.

Triton is imported when a call comes, never with the package.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmkern import triton
from llmkern.rows import as_rows

if TYPE_CHECKING:
    from llmkern.inspect.triton_source import Compilation

MODULE = "llmkern.activation.triton_kernels"
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
#: Elements of a program's tile: 16 a thread, two or four loads of 16 bytes for each operand.
TILE = 2048


def tile(width: int) -> dict[str, int]:
    columns = min(max(triton.power_of_two(width), 16), 1024)
    return {"ROWS": TILE // columns, "COLUMNS": columns}


def grid(x: Tensor, shape: dict[str, int]) -> tuple[int, int]:
    return -(-x.size(0) // shape["ROWS"]), -(-x.size(1) // shape["COLUMNS"])


def gated(run: triton.Run, gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """What op.gated takes, by gated_kernel, which `run` runs."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if out.numel():
        gate, up = as_rows(gate), as_rows(up)
        shape = tile(gate.size(1))
        arguments = (gate, up, out, *gate.shape, gate.stride(0), up.stride(0))
        run(triton.Launch(
            MODULE, "gated_kernel", grid(gate, shape), arguments, {"ACTIVATION": activation, **shape}, OPTIONS,
            ("out",),
        ))  # fmt: skip
    return out


def gated_backward(run: triton.Run, grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """What op.gated_backward takes, by gated_backward_kernel, which `run` runs."""
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    if dgate.numel():
        grad, gate, up = as_rows(grad), as_rows(gate), as_rows(up)
        shape = tile(gate.size(1))
        arguments = (grad, gate, up, dgate, dup, *gate.shape, grad.stride(0), gate.stride(0), up.stride(0))
        run(triton.Launch(
            MODULE, "gated_backward_kernel", grid(gate, shape), arguments, {"ACTIVATION": activation, **shape},
            OPTIONS, ("dgate", "dup"),
        ))  # fmt: skip
    return dgate, dup


TRITON_GATED = triton.served_by(gated)
TRITON_GATED_BACKWARD = triton.served_by(gated_backward)


def compilations() -> Iterator[Compilation]:
    """What `python -m llmkern inspect` compiles: the quickest activation and the longest, rows of 4096."""
    from llmkern.inspect.triton_source import Compilation

    for activation in ("silu", "gelu"):
        x, made = torch.empty(64, 4096, dtype=torch.bfloat16, device="meta"), list[triton.Launch]()
        gated(made.append, x, x, activation)
        gated_backward(made.append, x, x, x, activation)
        for launch in made:
            yield Compilation.of(launch, f"bf16, {activation}")
