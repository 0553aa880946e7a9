"""When Triton's attention looks at a dense mask by tiles first, and the launch that does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmkern import triton
from llmkern.attention.triton_call import Call
from llmkern.attention.triton_configurations import MASK_TILE

if TYPE_CHECKING:
    from llmkern.inspect.triton_source import Compilation

#: With fewer queries or keys there are few tiles to skip, and one more launch to pay.
LEAST = 128
#: Tiles side by side of a program: 16 bytes of a row to a thread, twice.
_TILES = 8
_OPTIONS = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": True}


class MaskTiles:
    """The table of a call's mask, a byte for each MASK_TILE x MASK_TILE of it, or none where it would not pay.

    wanted: whether there is one. steps: its strides, of batch, head, row and column, 0 where the mask is broadcast.
    """

    def __init__(self, run: triton.Run, call: Call, mask: Tensor | None, mask_grad: bool = False) -> None:
        """mask_grad: the gradient of the mask is asked for."""
        self._run = run
        self.steps: tuple[int, ...] = (0, 0, 0, 0)
        self.wanted = mask is not None and min(call.queries, call.keys) >= LEAST and not mask_grad
        if mask is None or not self.wanted:
            return
        sizes = (call.batch, call.heads, call.queries, call.keys)
        self._mask_steps = call.dense_steps
        self._sizes = [1 if step == 0 else size for step, size in zip(self._mask_steps, sizes, strict=True)]
        self._shape = (*self._sizes[:2], *(-(-n // MASK_TILE) for n in self._sizes[2:]))
        # Numbers that are added, of every head and batch its own, are rarely 0 or -inf for a whole tile, and attention
        # reads them once, as the look at them does.
        self.wanted = mask.dtype == torch.bool or math.prod(self._sizes) < math.prod(sizes)
        if self.wanted:
            steps = (math.prod(self._shape[i + 1 :]) for i in range(4))
            self.steps = tuple(0 if n == 1 else step for n, step in zip(self._shape, steps, strict=True))

    def make(self, mask: Tensor | None, query: Tensor) -> Tensor:
        """Launches what fills the table, and returns it; query stands for one that is not wanted."""
        if mask is None or not self.wanted:
            return query
        table = torch.empty(self._shape, dtype=torch.uint8, device=query.device)
        added = mask.dtype != torch.bool
        across = -(-self._shape[3] // _TILES)
        arguments = (mask if added else mask.view(torch.uint8), table, *self._sizes[1:], *self._mask_steps)
        constants = {"ADDED": added, "DENSE_ROWS": self._mask_steps[3] == 1, "SIZE": MASK_TILE, "TILES": _TILES}
        self._run(triton.Launch(
            "llmkern.attention.triton_mask", "attention_mask_tiles_kernel", (math.prod(self._shape[:3]) * across,),
            arguments, constants, _OPTIONS, ("table",),
        ))  # fmt: skip
        return table


def examples(dtype: torch.dtype) -> Iterator[triton.Launch]:
    """The launch for a mask of 1024 x 1024 that all heads share, without memory."""
    made: list[triton.Launch] = []
    x = torch.empty(1, 8, 1024, 64, dtype=torch.bfloat16, device="meta")
    mask = torch.empty(1, 1, 1024, 1024, dtype=dtype, device="meta")
    rules = (mask, None, None, None, None, -1, -1, False, 0.0, 0.0, 0.125, False)
    MaskTiles(made.append, Call(x, x, x, rules), mask).make(mask, x)
    yield from made


def compilations() -> Iterator[Compilation]:
    """What `python -m llmkern inspect` compiles: masks of bytes and of bfloat16."""
    from llmkern.inspect.triton_source import Compilation

    for name, dtype in (("bool", torch.bool), ("bf16", torch.bfloat16)):
        for launch in examples(dtype):
            yield Compilation.of(launch, name)
