"""MultiHeadAttention as a drop-in: outputs, weights and gradients of the plain one, and its state_dict."""

from __future__ import annotations

import pytest
import torch

import llmkern
from llmkern import reference
from llmkern.functional import scaled_dot_product_attention
from llmkern.verify import verify

MASKS = {
    "none": None,
    "integers": torch.tril(torch.ones(9, 9, dtype=torch.int64)),
    "floats": torch.tril(torch.ones(1, 9, 9)),
    "padding": (torch.arange(9) < torch.tensor([[9], [4], [0]]))[:, None, None, :],
    "empty rows": (torch.arange(81).view(1, 1, 9, 9) % 4 > 0) & (torch.arange(9) != 5)[:, None],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_outputs_weights_and_gradients(mask, dtype, isa):
    fast = llmkern.MultiHeadAttention(48, 4).to(dtype)
    x = torch.randn(3, 9, 48, dtype=dtype)
    report = verify(fast, None, (x, x, x, mask))
    report.raise_if_failed()
    assert "cannot run in" not in report.note  # the plain version is judged in its own dtype


@pytest.mark.parametrize("module", [reference.MultiHeadAttention, llmkern.MultiHeadAttention])
def test_masked_weights_are_zero_under_autocast_in_half_precision(module):
    layer, x = module(48, 4), torch.randn(2, 9, 48)
    with torch.autocast("cpu", torch.float16):
        weights = layer(x, x, x, torch.ones(9, 9).tril(-1))[1]
    assert weights.triu(0)[..., 1:, :].abs().max() == 0
    assert torch.allclose(weights[..., 0, :].float(), torch.tensor(1 / 9), atol=1e-4)  # a row without keys


@pytest.mark.parametrize("module", [reference.MultiHeadAttention, llmkern.MultiHeadAttention])
@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 3, 5), (0, 0, 0), (2, 0, 3), (2, 3, 0)])
def test_empty_batches_and_lengths(module, batch, queries, keys):
    query, key = torch.randn(batch, queries, 48), torch.randn(batch, keys, 48)
    output, weights = module(48, 4)(query, key, key)
    assert output.shape == (batch, queries, 48) and weights.shape == (batch, 4, queries, keys)


def test_without_weights_and_other_lengths(isa):
    fast = llmkern.MultiHeadAttention(48, 4)
    plain = reference.MultiHeadAttention(48, 4)
    plain.load_state_dict(fast.state_dict())
    q, k, v = torch.randn(2, 5, 48), torch.randn(2, 11, 48), torch.randn(2, 11, 48)
    output, weights = fast(q, k, v, need_weights=False)
    assert weights is None
    assert torch.equal(output, fast(q, k, v)[0])
    lengths = torch.tensor([11, 4])
    mask = (torch.arange(11) < lengths[:, None])[:, None, None]
    torch.testing.assert_close(fast(q, k, v, key_lengths=lengths)[0], plain(q, k, v, mask)[0])
    x = torch.randn(2, 5, 48)
    torch.testing.assert_close(fast(x, x, x, is_causal=True)[1], plain(x, x, x, torch.ones(5, 5).tril())[1])


FEATURES = {
    "window": {"window_size": (2, 1)},
    "causal window": {"window_size": (2, -1), "is_causal": True},
    "cap": {"softcap": 0.5},
    "slopes": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0])},
    "slopes of batches": {"alibi_slopes": torch.rand(3, 4), "is_causal": True},
    "sink": {"learnable_sink": torch.tensor([0.5, -1.0, 2.0, 0.0])},
}


@pytest.mark.parametrize("options", FEATURES.values(), ids=FEATURES)
def test_rules_beyond_the_reference(options):
    fast, x = llmkern.MultiHeadAttention(48, 4), torch.randn(3, 9, 48)
    output, weights = fast(x, x, x, **options)
    q, k, v = (w(x).view(3, 9, 4, 12).transpose(1, 2) for w in (fast.w_q, fast.w_k, fast.w_v))
    expected = scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(output, fast.w_o(expected.transpose(1, 2).flatten(2)))
    torch.testing.assert_close(weights @ v, expected)
    assert torch.equal(fast(x, x, x, need_weights=False, **options)[0], output)
    rows = weights.sum(-1)
    assert (rows < 1).all() if "learnable_sink" in options else torch.allclose(rows, torch.ones(()))


def test_a_row_without_keys_and_a_sink():
    """Without a sink it averages all values; a sink takes all of it."""
    fast, x = llmkern.MultiHeadAttention(48, 4), torch.randn(2, 3, 48)
    mask = torch.zeros(3, 3, dtype=torch.bool)
    assert torch.allclose(fast(x, x, x, mask)[1], torch.tensor(1 / 3))
    assert fast(x, x, x, mask, learnable_sink=torch.zeros(4))[1].abs().max() == 0


def test_a_learnt_sink_has_a_gradient():
    fast, x, sink = llmkern.MultiHeadAttention(48, 4), torch.randn(2, 3, 48), torch.zeros(4, requires_grad=True)
    output, weights = fast(x, x, x, learnable_sink=sink)
    (output.square().sum() + weights.square().sum()).backward()
    assert sink.grad.isfinite().all() and sink.grad.abs().min() > 0


def test_state_dicts_load_both_ways():
    fast, plain = llmkern.MultiHeadAttention(16, 2), reference.MultiHeadAttention(16, 2)
    plain.load_state_dict(fast.state_dict(), strict=True)
    fast.load_state_dict(plain.state_dict(), strict=True)
