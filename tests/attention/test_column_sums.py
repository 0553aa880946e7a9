"""What each key receives: the sums of the weights over the queries, and their gradient."""

from __future__ import annotations

import pytest
import torch

from llmkern.attention import op, reference
from llmkern.attention.mask import Mask
from llmkern.functional import attention_column_sums, attention_weights, scaled_dot_product_attention
from llmkern.verify import verify
from tests.attention.cases import FEATURES, RULES, attend, differentiable, rule, tensors

# Many strips of queries, and in the plain version more than are in memory at a time.
SHAPE = (2, 2, 1, 270, 40, 8, 1)


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


@pytest.mark.parametrize("name", [*RULES, *FEATURES])
def test_contract(name, isa):
    q, k, _ = tensors(SHAPE)
    verify(sums(), sums(plain=True), (q, k), rule(name, SHAPE)).raise_if_failed()


@pytest.mark.parametrize("name", ["bottom right", "window", "rows", "everything"])
def test_several_blocks_of_keys(name, isa):
    shape = (1, 4, 2, 50, 400, 20, 1)
    q, k, _ = tensors(shape)
    verify(sums(), sums(plain=True), (q, k), rule(name, shape)).raise_if_failed()


def test_rows_without_keys_that_attend_to_all_alike():
    q, k, v = tensors((1, 2, 2, 30, 200, 8, 1))
    seen = torch.rand(1, 1, 30, 1) > 0.4
    args = (Mask(seen), 0.3, True)
    logsumexp = op.attention(q, k, v, *args)[1]
    weights = op.attention_weights(q, k, logsumexp, *args)
    torch.testing.assert_close(op.attention_column_sums(q, k, logsumexp, *args), weights.sum(2))


def test_without_queries(isa):
    q, k, _ = tensors((2, 2, 2, 0, 300, 8, 1))
    assert torch.equal(sums()(q, k), torch.zeros(2, 2, 300))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["all", "bottom right", "rows", "additive", "everything"])
def test_half_precision(name, dtype, isa):
    q, k, _ = tensors(SHAPE, dtype)
    verify(sums(), sums(plain=True), (q, k), rule(name, SHAPE, dtype), gradients=False).raise_if_failed()


def test_they_are_the_sums_of_the_weights():
    q, k, v = tensors((2, 4, 2, 20, 30, 16, 8))
    _, weights = attend(weights=True)(q, k, v, causal=True)
    torch.testing.assert_close(sums()(q, k, causal=True), weights.sum(2))
    args = (*Mask(window_right=0).arguments(), 0.25, False)
    torch.testing.assert_close(
        reference.attention_column_sums(q, k, q.new_zeros(2, 4, 20), *args), weights.sum(2)
    )  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"attn_mask": torch.rand(9, 13) > 0.3}, {"window_size": (3, 2), "softcap": 2.0},
     {"alibi_slopes": torch.rand(4), "learnable_sink": torch.randn(4), "causal_alignment": "bottom_right"},
     {"key_lengths": torch.tensor([13, 4]), "scale": 0.7}],
)  # fmt: skip
def test_the_function(options):
    q, k, v = tensors((2, 4, 2, 9, 13, 8, 13))
    logsumexp = scaled_dot_product_attention(q, k, v, enable_gqa=True, return_logsumexp=True, **options)[1]
    weights = scaled_dot_product_attention(q, k, torch.eye(13).expand(2, 2, 13, 13), enable_gqa=True, **options)
    torch.testing.assert_close(attention_column_sums(q, k, logsumexp, **options), weights.sum(2))
    torch.testing.assert_close(attention_weights(q, k, logsumexp, **options), weights)


def test_under_autocast():
    q, k, v = tensors((1, 2, 2, 9, 13, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        logsumexp = scaled_dot_product_attention(q, k, v, return_logsumexp=True)[1]
        weights, found = attention_weights(q, k, logsumexp), attention_column_sums(q, k, logsumexp)
    assert weights.dtype == torch.bfloat16
    torch.testing.assert_close(weights.float().sum(2), found, atol=2e-2, rtol=0)
    torch.testing.assert_close(found.sum(-1), torch.full((1, 2), 9.0), atol=1e-3, rtol=0)


def test_second_derivatives_and_bad_inputs():
    q, k, _ = (t.requires_grad_() for t in tensors((1, 2, 2, 5, 6, 8, 1)))
    logsumexp = torch.logsumexp((q @ k.transpose(2, 3)).double() / 8**0.5, -1).detach()

    def twice(sums):
        (first,) = torch.autograd.grad(sums.square().sum(), q, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (q, k))

    plain = (q @ k.transpose(2, 3) / 8**0.5).softmax(-1).sum(2)
    for a, b in zip(twice(attention_column_sums(q, k, logsumexp)), twice(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for changed, error, message in [
        ({"logsumexp": logsumexp.float()}, TypeError, "logsumexp: expected dtype float64, got float32"),
        ({"logsumexp": logsumexp[:, :1]}, ValueError, r"logsumexp: expected \(B, H, Sq\) = \(1, 2, 5\)"),
        ({"key": None}, TypeError, "key: expected a torch.Tensor, got NoneType"),
        ({"attn_mask": torch.zeros(5, 6), "is_causal": True}, ValueError, "attn_mask: expected None"),
        ({"causal_alignment": "x"}, ValueError, "causal_alignment: expected one of"),
        ({"softcap": -1.0}, ValueError, "softcap: expected"),
        ({"softcap": "a"}, TypeError, "softcap: expected a number, got 'a'"),
        ({"scale": "a"}, TypeError, "scale: expected a number, got 'a'"),
        ({"scale": float("nan")}, ValueError, "scale: expected a finite number, got nan"),
        ({"is_causal": "a"}, TypeError, "is_causal: expected True or False, got 'a'"),
        ({"key_lengths": [1]}, TypeError, "key_lengths: expected a torch.Tensor, got list"),
        ({"query": torch.zeros(())}, ValueError, r"query: expected \(B, H, Sq, D\), got shape \(\)"),
        ({"attn_mask": torch.zeros(5, 7)}, ValueError, r"attn_mask: .* = \(1, 2, 5, 6\), got shape \(5, 7\)"),
        ({"attn_mask": torch.zeros(1, 1, 2, 5, 6)}, ValueError, r"attn_mask: .* got shape \(1, 1, 2, 5, 6\)"),
        ({"attn_mask": torch.zeros(5, 6, dtype=torch.int32)}, TypeError, "attn_mask: expected dtype bool or float32"),
        ({"attn_mask": torch.zeros(5, 6, device="meta")}, ValueError, "attn_mask: expected the device of query, cpu"),
        ({"attn_mask": torch.zeros(5, 6).to_sparse()}, TypeError, "attn_mask: expected a dense tensor"),
    ]:
        with pytest.raises(error, match=message):
            attention_weights(**{"query": q, "key": k, "logsumexp": logsumexp, **changed})
        with pytest.raises(error, match=message):
            attention_column_sums(**{"query": q, "key": k, "logsumexp": logsumexp, **changed})
