"""What each key receives: the sums of the weights over the queries, and their gradient."""

from __future__ import annotations

import pytest
import torch

from llmkern.attention import op, reference
from llmkern.attention.mask import Mask
from llmkern.verify import verify
from tests.attention.cases import FEATURES, RULES, attend, differentiable, rule, tensors

# More queries than are in memory at a time.
SHAPE = (2, 4, 2, 300, 130, 16, 1)


def sums(plain=False):
    def function(query, key, mask=None, key_lengths=None, causal=False, bottom_right=False, window=(-1, -1), **rest):
        value = query.new_zeros(*key.shape[:3], 1)
        slopes, sink = rest.get("slopes"), rest.get("sink")
        described = Mask(
            mask, key_lengths, slopes if slopes is None else slopes.detach(), sink if sink is None else sink.detach(),
            rest.get("seed"), window[0], 0 if causal else window[1], bottom_right, rest.get("softcap", 0.0),
            rest.get("dropout_p", 0.0),
        )  # fmt: skip
        scale = query.size(3) ** -0.5
        if plain:
            return differentiable(query, key, value, described, scale)[2].float().sum(2)
        with torch.no_grad():
            logsumexp = op.attention(query, key, value, described, scale)[1]
        return op.attention_column_sums(query, key, logsumexp, described, scale)

    return function


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*RULES, *FEATURES])
def test_contract(name, dtype, isa):
    q, k, _ = tensors(SHAPE, dtype)
    gradients = dtype == torch.float32 and name != "lengths, bottom right"
    verify(sums(), sums(plain=True), (q, k), rule(name, SHAPE, dtype), gradients=gradients).raise_if_failed()


def test_they_are_the_sums_of_the_weights():
    q, k, v = tensors((2, 4, 2, 20, 30, 16, 8))
    _, weights = attend(weights=True)(q, k, v, causal=True)
    torch.testing.assert_close(sums()(q, k, causal=True), weights.sum(2))
    args = (*Mask(window_right=0).arguments(), 0.25, False)
    torch.testing.assert_close(
        reference.attention_column_sums(q, k, q.new_zeros(2, 4, 20), *args), weights.sum(2)
    )  # fmt: skip
