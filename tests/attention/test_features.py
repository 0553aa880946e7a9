"""scaled_dot_product_attention beyond torch's arguments, against plain formulas, in any rank, and side by side."""

from __future__ import annotations

import pytest
import torch

from llmkern import functional
from llmkern.functional import scaled_dot_product_attention
from tests.attention.cases import tensors

SHAPE = (2, 4, 2, 9, 13, 8, 6)


def scores(q, k):
    return q @ k.repeat_interleave(q.size(1) // k.size(1), 1).transpose(2, 3) / q.size(3) ** 0.5


def finish(s, v):
    weights = s.softmax(-1).nan_to_num(0.0)
    return weights[..., : v.size(2)] @ v.repeat_interleave(s.size(1) // v.size(1), 1)


@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(-1, -1), (2, -1), (-1, 3), (4, 1), (0, 0), (100, 100)])
def test_window(window, causal, alignment):
    q, k, v = tensors(SHAPE)
    place = torch.arange(9)[:, None] + (4 if alignment == "bottom_right" else 0)
    column = torch.arange(13)
    seen = torch.ones(9, 13, dtype=torch.bool)
    if window[0] >= 0:
        seen &= column >= place - window[0]
    if window[1] >= 0:
        seen &= column <= place + window[1]
    if causal:
        seen &= column <= place
    output = scaled_dot_product_attention(
        q, k, v, is_causal=causal, enable_gqa=True, causal_alignment=alignment, window_size=window
    )
    torch.testing.assert_close(output, finish(scores(q, k).masked_fill(~seen, -torch.inf), v))


def test_softcap_comes_before_everything_else():
    q, k, v = tensors(SHAPE)
    slopes, added = torch.rand(4), torch.randn(9, 13)
    output = scaled_dot_product_attention(q, k, v, added, enable_gqa=True, softcap=1.5, alibi_slopes=slopes)
    s = 1.5 * torch.tanh(scores(q, k) / 1.5)
    s = s - slopes[:, None, None] * (torch.arange(9)[:, None] - torch.arange(13)).abs() + added
    torch.testing.assert_close(output, finish(s, v))


def test_alibi_at_the_bottom_right():
    q, k, v = tensors(SHAPE)
    lengths, slopes = torch.tensor([13, 5]), torch.rand(2, 4)
    options = {"key_lengths": lengths, "causal_alignment": "bottom_right", "alibi_slopes": slopes, "enable_gqa": True}
    place = torch.arange(9)[:, None] + (lengths - 9)[:, None, None, None]
    s = scores(q, k) - slopes[..., None, None] * (place - torch.arange(13)).abs()
    s = s.masked_fill(torch.arange(13) >= lengths[:, None, None, None], -torch.inf)
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, **options), finish(s, v))


def test_sink_and_logsumexp():
    q, k, v = tensors(SHAPE)
    sink = torch.randn(4, requires_grad=True)
    output, sums = scaled_dot_product_attention(
        q, k, v, enable_gqa=True, learnable_sink=sink, return_logsumexp=True
    )  # fmt: skip
    s = torch.cat((scores(q, k), sink[:, None, None].expand(2, 4, 9, 1)), -1)
    torch.testing.assert_close(output, finish(s, v))
    torch.testing.assert_close(sums, s.double().logsumexp(-1), rtol=1e-6, atol=1e-6)
    (grad,) = torch.autograd.grad(output.square().sum() + sums.sin().sum(), sink)
    (expected,) = torch.autograd.grad(finish(s, v).square().sum() + s.logsumexp(-1).sin().sum(), sink)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 8), (3, 5, 8), (2, 3, 5, 8), (2, 2, 3, 5, 8)])
def test_ranks(shape):
    q, k, v = (torch.randn(shape) for _ in range(3))
    output, sums = scaled_dot_product_attention(
        q, k, v, window_size=(1, 0), softcap=2.0, dropout_p=0.2, dropout_seed=3, return_logsumexp=True
    )
    assert output.shape == q.shape and sums.shape == shape[:-1] and sums.dtype == torch.float64
    s = 2.0 * torch.tanh(q @ k.transpose(-1, -2) / 8**0.5 / 2.0)
    s = s.masked_fill(~(torch.ones(5, 5).tril() - torch.ones(5, 5).tril(-2)).bool(), -torch.inf)
    torch.testing.assert_close(sums, s.logsumexp(-1).double(), rtol=1e-5, atol=1e-5)


def test_slopes_that_require_a_gradient_are_refused():
    q, k, v = tensors(SHAPE)
    with pytest.raises(ValueError, match="alibi_slopes: expected a tensor that requires no gradient"):
        scaled_dot_product_attention(q, k, v, enable_gqa=True, alibi_slopes=torch.rand(4, requires_grad=True))


def test_repeated_calls_tell_every_argument_apart():
    """A call's launcher is kept for its metadata: no option may be missing from them."""
    q, k, v = tensors((2, 4, 4, 9, 9, 8, 8))
    calls = [
        {}, {"window_size": (2, -1)}, {"window_size": (-1, 2)}, {"softcap": 1.0}, {"softcap": 2.0}, {"is_causal": True},
        {"alibi_slopes": torch.ones(4)}, {"learnable_sink": torch.ones(4)}, {"dropout_p": 0.5, "dropout_seed": 1},
        {"dropout_p": 0.5, "dropout_seed": 2}, {"dropout_p": 0.25, "dropout_seed": 1},
        {"is_causal": True, "causal_alignment": "bottom_right", "key_lengths": torch.tensor([9, 4])},
        {"is_causal": True, "key_lengths": torch.tensor([9, 4])},
    ]  # fmt: skip
    first = [scaled_dot_product_attention(q, k, v, **c) for c in calls]
    for output, call in zip(first, calls, strict=True):
        assert torch.equal(scaled_dot_product_attention(q, k, v, **call), output)
        assert torch.equal(scaled_dot_product_attention(q, k, v, deterministic=True, **call), output)
        again, sums = scaled_dot_product_attention(q, k, v, return_logsumexp=True, **call)
        assert torch.equal(again, output) and sums.shape == (2, 4, 9)
    for i, a in enumerate(first):
        assert not any(torch.equal(a, b) for b in first[:i])


@pytest.mark.parametrize("features", [{"window_size": (3, 0)}, {"softcap": 3.0, "dropout_p": 0.2, "dropout_seed": 4}])
def test_compile_fullgraph_with_gradients(features):
    sink, slopes = torch.randn(4, requires_grad=True), torch.rand(4)

    def function(q, k, v, sink):
        output, sums = functional.scaled_dot_product_attention(
            q, k, v, learnable_sink=sink, alibi_slopes=slopes, enable_gqa=True, return_logsumexp=True, **features
        )
        return output.square(), sums

    inputs = [*(t.requires_grad_() for t in tensors(SHAPE)), sink]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected, output = function(*inputs), compiled(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(output, expected, strict=True))
    grads, wanted = (torch.autograd.grad([o.sum() for o in results], inputs) for results in (output, expected))
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_vmap():
    q, k, v = (torch.randn(3, 2, 4, 5, 8) for _ in range(3))
    mapped = torch.func.vmap(lambda q, k, v: scaled_dot_product_attention(q, k, v, window_size=(2, 0)))(q, k, v)
    torch.testing.assert_close(mapped, scaled_dot_product_attention(q, k, v, window_size=(2, 0)))
