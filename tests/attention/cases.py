"""Named shapes and rules that the tests of this family share."""

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
    "head 576, value 512": (1, 2, 1, 7, 40, 576, 512),
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
#: Rules beyond who sees whom, and windows, which leave some rows empty where there are fewer keys than queries.
FEATURES = [
    "window", "window, bottom right", "window to the right", "softcap", "alibi", "alibi of batches, bottom right",
    "sink", "sink, rows", "dropout", "everything", "everything, additive",
]  # fmt: skip


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
    if name in FEATURES:
        return feature(name, shape, dtype, lengths)
    return {
        "all": {},
        "causal": {"causal": True},
        "bottom right": {"causal": True, "bottom_right": True},
        "lengths": {"key_lengths": lengths},
        "lengths, bottom right": {"key_lengths": lengths, "causal": True, "bottom_right": True},
    }[name]


def feature(name: str, shape: tuple[int, ...], dtype: torch.dtype, lengths: Tensor) -> dict[str, object]:
    batch, heads = shape[:2]
    slopes = 2.0 ** -torch.arange(1.0, heads + 1)
    sink = torch.randn(heads)
    everything = {
        "key_lengths": lengths, "window": (9, 30), "bottom_right": True, "softcap": 3.0, "sink": sink,
        "slopes": slopes * torch.rand(batch, 1), "dropout_p": 0.2, "seed": torch.tensor(7),
    }  # fmt: skip
    return {
        "window": {"window": (3, 5)},
        "window, bottom right": {"window": (11, 2), "bottom_right": True, "key_lengths": lengths},
        "window to the right": {"window": (-1, 4)},
        "softcap": {"softcap": 2.0, "causal": True},
        "alibi": {"slopes": slopes},
        "alibi of batches, bottom right": {
            "slopes": slopes * torch.rand(batch, 1),
            "bottom_right": True,
            "causal": True,
        },
        "sink": {"sink": sink.to(dtype)},
        "sink, rows": {"sink": sink, **rule("rows", shape)},
        "dropout": {"dropout_p": 0.3, "seed": torch.tensor(-3), "causal": True},
        "everything": everything,
        "everything, additive": {**everything, **rule("additive", shape, dtype)},
    }[name]


def attend(
    uniform: bool = False, plain: bool = False, weights: bool = False, logsumexp: bool = False, sink_grad: bool = False
):
    """A function of (query, key, value, mask=...) for the operators or the plain version.

    weights, logsumexp: returned too; the latter, float64 so that no rounding is added to it, comes of float32
    arithmetic and is held to that. sink_grad: the sink is differentiated; a gradient of few numbers says little
    about the error, so that this is left to shapes of many heads.
    """
    from llmkern.attention import op
    from llmkern.attention.mask import Mask

    def function(
        query, key, value, mask=None, key_lengths=None, causal=False, bottom_right=False, window=(-1, -1), softcap=0.0,
        slopes=None, sink=None, dropout_p=0.0, seed=None,
    ):  # fmt: skip
        right = 0 if causal else window[1]
        slopes = None if slopes is None else slopes.detach()  # they have no gradient
        sink = sink if sink is None or sink_grad else sink.detach()
        described = Mask(
            mask, key_lengths, slopes, sink, seed, window[0], right, bottom_right, softcap, dropout_p
        )  # fmt: skip
        scale = max(query.size(3), 1) ** -0.5
        if plain:
            output, sums, made = differentiable(query, key, value, described, scale, uniform)
        else:
            output, sums = op.attention(query, key, value, described, scale, uniform)
            made = op.attention_weights(query, key, sums, described, scale, uniform) if weights else None
        results = [output, *([made] if weights else []), *([sums.float()] if logsumexp else [])]
        return results[0] if len(results) == 1 else tuple(results)

    return function


def differentiable(query, key, value, mask, scale, uniform=False):
    """The plain version through autograd and not through its own backward, which is under test too."""
    from llmkern.attention.reference import dense

    scores, seen = dense._scores(query, key, mask, scale)
    weights, _, _ = dense._softmax(scores, seen, mask, uniform)
    output = torch.matmul(dense._dropped(weights, mask, 0), dense._for_each_head(value, query))
    return output, torch.logsumexp(dense._with_sink(scores, mask).double(), -1), weights
