"""Named shapes, layouts and functions that the tests of this family share."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern.positional import op, reference

FLOATS = [torch.float32, torch.bfloat16, torch.float16]

# (S, B, D)
SINUSOIDAL = {
    "one of everything": (1, 1, 1),
    "usual": (33, 4, 64),
    "primes": (17, 3, 37),
    "around a vector": (3, 2, 17),
    "no positions": (0, 2, 8),
    "no batch": (3, 0, 8),
    "wide": (2, 1, 1030),
}
# (B, H, Hkv, S, D, R); Hkv 0: no keys at all
ROTARY = {
    "one of everything": (1, 1, 1, 1, 2, 2),
    "usual": (2, 4, 4, 33, 64, 64),
    "grouped heads": (2, 6, 2, 17, 80, 80),
    "rotated in part": (1, 2, 1, 9, 37, 22),
    "an odd number of pairs": (1, 3, 3, 5, 34, 34),
    "queries alone": (2, 3, 0, 7, 16, 16),
    "no positions": (2, 2, 2, 0, 16, 16),
    "no batch": (0, 2, 2, 3, 16, 16),
    "head 256": (1, 2, 2, 3, 256, 256),
    "pairs that fill no vector": (1, 2, 1, 3, 48, 24),
}


def sinusoidal_inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    length, batch, width = shape
    return torch.randn(length, batch, width).to(dtype), reference.sinusoidal_table(length + 3, width)


def rotary_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    batch, heads, kv_heads, length, width, rotated = shape
    q = torch.randn(batch, heads, length, width).to(dtype)
    k = torch.randn(batch, kv_heads, length, width).to(dtype) if kv_heads else None
    return q, k, *reference.rotary_table(length + 5, rotated, 10000.0)


def add(x, pe, scale=1.0, dropout_p=0.0, seed=None):
    return op.sinusoidal_add(x, pe, scale=scale, dropout_p=dropout_p, seed=seed)


def rotate(interleaved=False, position_ids=None, plain=False):
    """A function of (q, k, cos, sin), whose gradients are looked at too."""
    function = reference.rotary if plain else op.rotary

    def rotated(q, k, cos, sin):
        outputs = function(q, k, cos, sin, interleaved=interleaved, position_ids=position_ids)
        return outputs if k is not None else outputs[:1]

    return rotated


def fused_qkv(t: Tensor) -> Tensor:
    """The same numbers as a view of a projection (B, S, 3, H, D)."""
    return torch.stack([t.transpose(1, 2)] * 3, 2)[:, :, 1].transpose(1, 2)


def apart(t: Tensor, room: int) -> Tensor:
    """The same numbers, with other elements between the rows."""
    return torch.nn.functional.pad(t, (0, room), value=7.0)[..., : t.size(-1)]


ROTARY_LAYOUTS = {
    "batch, sequence, head": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "one fused projection": fused_qkv,
    "head dimension outermost": lambda t: t.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    "misaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t),
    "rows apart": lambda t: apart(t, 5),
    "every second": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
}
