"""Named shapes and masks that the tests of this family share."""

from __future__ import annotations

import torch
from torch import Tensor

# (B, H, Hkv, Sq, Sk, D, Dv)
SHAPES = {
    "one of everything": (1, 1, 1, 1, 1, 1, 1),
    "head 32": (2, 4, 4, 64, 64, 32, 32),
    "primes": (2, 3, 3, 67, 131, 17, 23),
    "around a block": (1, 2, 2, 65, 257, 64, 64),
    "grouped heads": (2, 6, 2, 33, 70, 40, 40),
    "one query, many keys": (3, 4, 1, 1, 300, 64, 64),
    "head 256": (1, 1, 1, 19, 50, 256, 256),
    "odd head, wider value": (1, 2, 1, 20, 21, 63, 96),
    "no keys": (1, 2, 2, 3, 0, 16, 16),
    "no queries": (1, 2, 2, 0, 5, 16, 16),
    "no heads": (2, 0, 0, 3, 5, 16, 16),
    "no batch": (0, 2, 1, 3, 5, 16, 16),
    "no width": (3, 4, 2, 33, 40, 0, 16),
    "no value width": (3, 4, 2, 33, 40, 16, 0),
}
RULES = ["all", "causal", "bottom right", "lengths", "lengths, bottom right", "padding", "boolean", "additive", "rows"]


def tensors(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, kv_heads, queries, keys, size, width = shape
    return (
        torch.randn(batch, heads, queries, size, dtype=dtype),
        torch.randn(batch, kv_heads, keys, size, dtype=dtype),
        torch.randn(batch, kv_heads, keys, width, dtype=dtype),
    )


def rule(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> dict[str, object]:
    """Keyword arguments of `attend` for a kind of mask; "rows" leaves some rows without any key."""
    batch, heads, _, queries, keys, _, _ = shape
    lengths = torch.tensor([keys, keys // 3, 0, keys + 5])[torch.arange(batch) % 4]
    if name == "padding":
        return {"mask": (torch.arange(keys) < lengths[:, None])[:, None, None, :]}
    if name == "boolean":
        return {"mask": torch.rand(batch, 1, queries, keys) > 0.4}
    if name == "rows":
        return {"mask": (torch.rand(1, heads, queries, keys) > 0.3) & (torch.arange(queries) % 3 > 0)[:, None]}
    if name == "additive":
        added = torch.randn(1, heads, queries, keys)
        return {"mask": added.masked_fill(torch.rand(added.shape) > 0.8, -torch.inf).to(dtype)}
    return {
        "all": {},
        "causal": {"causal": True},
        "bottom right": {"causal": True, "bottom_right": True},
        "lengths": {"key_lengths": lengths},
        "lengths, bottom right": {"key_lengths": lengths, "causal": True, "bottom_right": True},
    }[name]


def attend(uniform: bool = False, plain: bool = False, weights: bool = False):
    """A function of (query, key, value, mask=...) for the operators or the plain version."""
    from llmkern.attention import op, reference
    from llmkern.attention.mask import Mask

    def function(query, key, value, mask=None, key_lengths=None, causal=False, bottom_right=False):
        described = Mask(mask, key_lengths, causal, bottom_right)
        scale = max(query.size(3), 1) ** -0.5
        if plain:
            args = (*described.arguments(), scale, uniform)
            output, logsumexp = _differentiable(query, key, value, described, scale, uniform)
            return (output, reference.attention_weights(query, key, logsumexp, *args)) if weights else output
        output, logsumexp = op.attention(query, key, value, described, scale, uniform)
        return (output, op.attention_weights(query, key, logsumexp, described, scale, uniform)) if weights else output

    return function


def _differentiable(query, key, value, mask, scale, uniform):
    """The plain version through autograd and not through its own backward, which is under test too."""
    from llmkern.attention import reference

    scores, seen = reference._scores(query, key, mask, scale)
    weights, _ = reference._softmax(scores, seen, uniform)
    output = torch.matmul(weights, reference._for_each_head(value, query))
    return output, torch.logsumexp(scores.double(), -1)
