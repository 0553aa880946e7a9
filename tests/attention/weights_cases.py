"""The weights of attention and their column sums as functions of (query, key), for the tests of GPU kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmkern.attention import op
from llmkern.attention.mask import Mask
from tests.attention.cases import differentiable


def _function(
    uniform: bool, plain: Callable[[Tensor], Tensor] | None, made: Callable[..., Tensor], sink_grad: bool = False
) -> Any:  # fmt: skip
    def function(
        query, key, mask=None, key_lengths=None, causal=False, bottom_right=False, window=(-1, -1), softcap=0.0,
        slopes=None, sink=None, dropout_p=0.0, seed=None,
    ):  # fmt: skip
        slopes = slopes if slopes is None else slopes.detach()  # they have no gradient
        sink = sink if sink is None or sink_grad else sink.detach()
        described = Mask(
            mask, key_lengths, slopes, sink, seed, window[0], 0 if causal else window[1], bottom_right, softcap,
            dropout_p if not uniform else 0.0,
        )  # fmt: skip
        scale = max(query.size(3), 1) ** -0.5
        value = query.new_zeros(*key.shape[:3], 1)
        if plain is not None:
            return plain(differentiable(query, key, value, described, scale, uniform)[2])
        with torch.no_grad():  # the weights are functions of query, key, mask and sink alone
            logsumexp = op.attention(query, key, value, described, scale, uniform)[1]
        return made(query, key, logsumexp, described, scale, uniform)

    return function


def weights(uniform: bool = False, plain: bool = False, sink_grad: bool = False) -> Any:
    """Takes what `cases.rule` gives, by keyword. plain: by torch's own operations. sink_grad: as of `cases.attend`."""
    return _function(uniform, (lambda w: w) if plain else None, op.attention_weights, sink_grad)


def column_sums(uniform: bool = False, plain: bool = False) -> Any:
    wide = {torch.float64: torch.float64}
    return _function(
        uniform, (lambda w: w.to(wide.get(w.dtype, torch.float32)).sum(2)) if plain else None, op.attention_column_sums
    )
