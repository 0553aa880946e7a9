"""Sequences laid end to end for the tests of GPU kernels: their lengths and rules, and each sequence alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from llmkern.attention import op, reference
from llmkern.attention.mask import Mask
from tests.attention.test_varlen import ends

#: Queries and keys of each sequence.
LENGTHS = {
    "around tiles": ([32, 1, 33], [33, 31, 1]),
    "empty ones": ([0, 4, 3, 0, 0], [2, 0, 6, 0, 0]),
    "long beside short": ([30, 25, 3], [130, 140, 5]),  # up to 128 keys and 24 queries sum delta over the weights
    "alone": ([17], [23]),
    "none": ([], []),
}
RULES = ["all", "causal", "bottom right", "window", "softcap", "slopes", "sink", "dropout", "everything"]


def rule(name: str, heads: int, sequences: int, dtype: torch.dtype = torch.float32) -> Mask:
    everything = {
        "window_left": 20, "window_right": 9, "bottom_right": True, "softcap": 3.0, "dropout_p": 0.2,
        "alibi_slopes": torch.rand(sequences, heads), "learnable_sink": torch.randn(heads).to(dtype),
        "dropout_seed": torch.tensor(7),
    }  # fmt: skip
    chosen: dict[str, dict[str, Any]] = {
        "all": {},
        "causal": {"window_right": 0},
        "bottom right": {"window_right": 0, "bottom_right": True},
        "window": {"window_left": 5, "window_right": 2},
        "softcap": {"softcap": 2.0, "window_right": 0},
        "slopes": {"alibi_slopes": torch.rand(heads)},
        "sink": {"learnable_sink": torch.randn(heads).to(dtype)},
        "dropout": {"dropout_p": 0.3, "dropout_seed": torch.tensor(-3), "window_right": 0},
        "everything": everything,
    }
    return Mask(**chosen[name])


def packed(
    lengths: tuple[Sequence[int], Sequence[int]], dtype: torch.dtype = torch.float32, heads: tuple[int, int] = (2, 1),
    widths: tuple[int, int] = (16, 12), of_bounds: torch.dtype = torch.int32,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor]]:  # fmt: skip
    """((query, key, value), (cu_seqlens_q, cu_seqlens_k))."""
    of_queries, of_keys = lengths
    q = torch.randn(sum(of_queries), heads[0], widths[0], dtype=dtype)
    k, v = (torch.randn(sum(of_keys), heads[1], width, dtype=dtype) for width in widths)
    return (q, k, v), (ends(of_queries, of_bounds), ends(of_keys, of_bounds))


def attend(bounds: tuple[Tensor, Tensor], mask: Mask, plain: bool = False, logsumexp: bool = False, scale: float = 0.3):
    """A function of (query, key, value) for the operator or the plain version, which autograd goes through."""

    def function(query: Tensor, key: Tensor, value: Tensor) -> Any:
        call = reference.attention_varlen if plain else torch.ops.llmkern.attention_varlen
        output, sums = call(query, key, value, *bounds, None, None, *mask.arguments()[2:], scale)
        return (output, sums.float()) if logsumexp else output

    return function


def alone(tensors: Sequence[Tensor], bounds: tuple[Tensor, Tensor]) -> Iterator[tuple[slice, slice, list[Tensor]]]:
    """Of each sequence its queries, its keys, and (query, key, value) as a batch of one, (1, H, S, D)."""
    of_queries, of_keys = (b.tolist() for b in bounds)
    for n in range(len(of_queries) - 1):
        at, keys = slice(*of_queries[n : n + 2]), slice(*of_keys[n : n + 2])
        yield at, keys, [t[x].transpose(0, 1)[None] for t, x in zip(tensors, (at, keys, keys), strict=True)]


def same_bits_as_alone(tensors: Sequence[Tensor], bounds: tuple[Tensor, Tensor], mask: Mask) -> None:
    """Outputs, log-sum-exps and gradients; of both results, so that every argument of the kernels is there."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    results = torch.ops.llmkern.attention_varlen(*leaves, *bounds, None, None, *mask.arguments()[2:], 0.3)
    grads = torch.randn_like(results[0]), torch.randn_like(results[1])
    found = torch.autograd.grad(results, leaves, grads)
    for at, keys, one in alone(tensors, bounds):
        one = [t.detach().requires_grad_() for t in one]
        expected = op.attention(*one, mask, 0.3)
        of_one = torch.autograd.grad(expected, one, (grads[0][at].transpose(0, 1)[None], grads[1][None, :, at]))
        assert torch.equal(results[0][at], expected[0][0].transpose(0, 1)), at
        assert torch.equal(results[1][:, at], expected[1][0]), at
        for name, place, a, b in zip(("query", "key", "value"), (at, keys, keys), found, of_one, strict=True):
            assert torch.equal(a[place], b[0].transpose(0, 1)), (name, place)
