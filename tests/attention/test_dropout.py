"""Dropout of the weights: the mask, its statistics, and a backward that makes the same one again."""

from __future__ import annotations

import pytest
import torch

from llmkern.attention.reference import dropout_factor
from llmkern.functional import scaled_dot_product_attention
from llmkern.random import philox
from tests.attention.cases import tensors


def factor(p, seed, q, k):
    """The mask as the output shows it: uniform weights, each value its own column."""
    values = torch.eye(k).expand(*q[:2], k, k)
    zeros = torch.zeros(*q[:3], 8), torch.zeros(*q[:2], k, 8)
    return scaled_dot_product_attention(*zeros, values, dropout_p=p, dropout_seed=seed) * k


def test_the_mask_is_a_function_of_seed_and_place():
    shape, keys = (3, 2, 7, 8), 13
    mask = factor(0.4, 5, shape, keys)
    expected = dropout_factor(torch.zeros(3, 2, 7, keys), 0.4, 5)
    torch.testing.assert_close(mask, expected)
    torch.testing.assert_close(factor(0.4, torch.tensor(5), shape, keys), expected)
    assert not torch.equal(factor(0.4, 6, shape, keys) > 0, expected > 0)
    assert not torch.equal(factor(0.4, 5 + 2**32, shape, keys) > 0, expected > 0)
    # Neither more queries, nor keys, nor batches behind a place change it.
    torch.testing.assert_close(factor(0.4, 5, (4, 2, 9, 8), 31)[:3, :, :7, :13] > 0, expected > 0)
    # The same words, one by one.
    for b, h, i, j in ((0, 0, 0, 0), (2, 1, 6, 12), (1, 0, 3, 7)):
        counter = tuple(torch.tensor(c) for c in (j // 4, i, b * 2 + h, 0))
        word = int(philox(counter, (torch.tensor(5), torch.tensor(0)))[j % 4])
        assert bool(expected[b, h, i, j] > 0) == (word >= 0.4 * 2**32)


def test_rate_and_expectation():
    kept = dropout_factor(torch.zeros(2, 3, 100, 200), 0.2, 11)
    assert torch.equal(kept.unique(), torch.tensor([0.0, 1.25]))
    dropped = (kept == 0).float()
    for part in (dropped, dropped[0, 1], dropped[..., ::4], dropped[:, :, ::7]):
        assert abs(part.mean() - 0.2) < 5 * (0.2 * 0.8 / part.numel()) ** 0.5
    together = (dropped[..., :-1] * dropped[..., 1:]).mean()
    assert abs(together - 0.04) < 5 * (0.04 * 0.96 / dropped.numel()) ** 0.5


def test_nothing_and_everything():
    q, k, v = tensors((2, 3, 3, 9, 11, 8, 8))
    plain = scaled_dot_product_attention(q, k, v)
    assert torch.equal(scaled_dot_product_attention(q, k, v, dropout_p=0.0, dropout_seed=1), plain)
    assert scaled_dot_product_attention(q, k, v, dropout_p=1.0, dropout_seed=1).abs().max() == 0


def test_without_a_seed_torchs_generator_decides():
    q, k, v = tensors((2, 3, 3, 9, 11, 8, 8))
    torch.manual_seed(4)
    first, second = (scaled_dot_product_attention(q, k, v, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(4)
    assert torch.equal(scaled_dot_product_attention(q, k, v, dropout_p=0.5), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("masked", [{}, {"is_causal": True}, {"learnable_sink": torch.zeros(3)}])
def test_backward_against_the_plain_formula(masked):
    q, k, v = (t.requires_grad_() for t in tensors((2, 3, 3, 9, 11, 8, 8)))
    output = scaled_dot_product_attention(q, k, v, dropout_p=0.3, dropout_seed=77, return_logsumexp=True, **masked)
    scores = q @ k.transpose(2, 3) / 8**0.5
    if "is_causal" in masked:
        scores = scores.masked_fill(~torch.ones(9, 11).tril().bool(), -torch.inf)
    if "learnable_sink" in masked:
        scores = torch.cat((scores, torch.zeros(2, 3, 9, 1)), -1)
    weights = scores.softmax(-1)[..., :11] * dropout_factor(torch.zeros(2, 3, 9, 11), 0.3, 77)
    expected = weights @ v, scores.logsumexp(-1).double()
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    grads = [torch.randn_like(t) for t in expected]
    for a, b in zip(
        torch.autograd.grad(output, (q, k, v), grads), torch.autograd.grad(expected, (q, k, v), grads), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
