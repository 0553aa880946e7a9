"""Dense masks whose tiles of 32 x 32 are hidden, seen and mixed, as Triton's look at them finds them; both ways."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern.attention import triton_mask_launch
from llmkern.attention.triton_configurations import MASK_TILE

#: (B, H, Hkv, Sq, Sk, D, Dv): tiles that end early in both directions.
SHAPE = (2, 2, 1, 40, 70, 16, 24)


def blocks(queries: int, keys: int, share: float = 0.5) -> Tensor:
    """(Sq, Sk) bool: tiles hidden, seen and mixed, and rows without any key."""
    down, across = -(-queries // MASK_TILE), -(-keys // MASK_TILE)
    kinds = (torch.arange(down * across).view(down, across) + 1) % 3
    kinds = kinds.repeat_interleave(MASK_TILE, 0).repeat_interleave(MASK_TILE, 1)[:queries, :keys]
    seen = (kinds == 1) | ((kinds == 2) & (torch.rand(queries, keys) < share))
    return seen & (torch.arange(queries) % 9 > 0)[:, None]


def masks(shape: tuple[int, ...] = SHAPE) -> dict[str, Tensor]:
    batch, heads, _, queries, keys, _, _ = shape
    seen = blocks(queries, keys)
    added = torch.where(seen, 0.0, -torch.inf)
    own = torch.stack([blocks(queries, keys, p) for p in torch.linspace(0.1, 0.9, batch * heads).tolist()])
    bias = torch.where(torch.rand(queries, keys) < 0.1, torch.randn(queries, keys), added)
    bias[:MASK_TILE] = added[:MASK_TILE]
    documents = torch.arange(queries)[:, None] // 34 == torch.arange(keys) // 34
    return {
        "shared by all": seen[None, None],
        "of every head": own.view(batch, heads, queries, keys),
        "of a batch, expanded": own[:batch].view(batch, 1, queries, keys).expand(batch, heads, queries, keys),
        "keys alone": (torch.arange(keys) < torch.tensor([[20], [66]])).view(2, 1, 1, keys),
        "queries alone": (torch.arange(queries) % 64 < 32).view(1, 1, queries, 1),
        "documents": documents[None, None],
        "columns first": seen.t().contiguous().t()[None, None],
        "all hidden": torch.zeros(1, 1, queries, keys, dtype=torch.bool),
        "zeros and -inf": added[None, None],
        "numbers among them": bias[None, None],
        "numbers of heads, in steps": torch.stack([bias, added]).repeat(heads // 2, 1, 2)[None, :, :, ::2][..., :keys],
    }


def looked_at(monkeypatch, always: bool) -> None:
    """Masks of few queries are looked at by tiles, or none are."""
    monkeypatch.setattr(triton_mask_launch, "LEAST", 1 if always else 1 << 40)
