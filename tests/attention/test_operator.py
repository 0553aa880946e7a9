"""The operators as torch sees them: opcheck, compile, export, autocast, forward mode, vmap's refusal."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck
from torch.nn import functional as F

import llmkern
from llmkern.attention.mask import Mask
from llmkern.attention.op import attention_column_sums
from llmkern.functional import scaled_dot_product_attention
from tests.attention.cases import attend, tensors

OPS = torch.ops.llmkern
REST = (*Mask(window_right=0).arguments(), 0.25, False)


def everything(queries=5, keys=7):
    """Rules of every kind, with an additive mask and a sink that require gradients."""
    added = torch.randn(1, 4, queries, keys, requires_grad=True)
    sink = torch.randn(4, requires_grad=True)
    slopes, seed = torch.rand(2, 4), torch.tensor(5)
    described = Mask(added, torch.tensor([keys, 3]), slopes, sink, seed, 4, 3, True, 20.0, 0.25)
    return described


@pytest.mark.parametrize("mask", [Mask(window_right=0), Mask(None, torch.tensor([7, 3])), everything()])
def test_opcheck(mask):
    q, k, v = (t.requires_grad_() for t in tensors((2, 4, 2, 5, 7, 16, 12)))
    rest = (*mask.arguments(), 0.25, False)
    grads = mask.dense is not None
    opcheck(OPS.attention, (q, k, v, *rest))
    output, logsumexp = (t.detach() for t in OPS.attention(q, k, v, *rest))
    opcheck(OPS.attention_weights, (q, k, logsumexp, *rest))
    opcheck(OPS.attention_column_sums, (q, k, logsumexp, *rest))
    some = torch.randn(2, 4, 5, dtype=torch.float64) if grads else None
    # Their gradients are composed of torch's operations, which look at values where some are infinite: not traced.
    q, k, v, *rest = (t.detach() if isinstance(t, torch.Tensor) else t for t in (q, k, v, *rest))
    opcheck(OPS.attention_backward, (output, some, q, k, v, output, logsumexp, *rest, grads))
    opcheck(OPS.attention_weights_backward, (torch.randn(2, 4, 5, 7), q, k, logsumexp, *rest, grads))


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compile_fullgraph_with_gradients(backend):
    def function(q, k, v):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).square()

    inputs = [t.requires_grad_() for t in tensors((2, 4, 2, 9, 9, 16, 16))]
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    expected, output = function(*inputs), compiled(*inputs)
    assert torch.equal(output, expected)
    for a, b in zip(
        torch.autograd.grad(output.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_export():
    module = llmkern.MultiHeadAttention(16, 4).eval()
    x = torch.randn(2, 5, 16)
    exported = torch.export.export(module, (x, x, x)).module()
    assert torch.equal(exported(x, x, x)[0], module(x, x, x)[0])


def test_autocast_runs_in_the_dtype_of_the_projections():
    module, x = llmkern.MultiHeadAttention(16, 4), torch.randn(2, 5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        output, weights = module(x, x, x)
    assert output.dtype == weights.dtype == torch.bfloat16
    output.float().sum().backward()
    assert module.w_q.weight.grad.dtype == torch.float32


def test_forward_mode_is_refused():
    q, k, v = tensors((1, 1, 1, 3, 3, 8, 8))
    functions = [
        lambda q: attend()(q, k, v), lambda q: attend(weights=True)(q.detach(), k, v)[1] * attend()(q, k, v),
        lambda q: attention_column_sums(q, k, torch.zeros(1, 1, 3, dtype=torch.float64), Mask(), 1.0),
    ]  # fmt: skip
    for function in functions:
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.jvp(function, (q,), (q,))


def test_torchs_signature_and_ranks():
    for shape in [(5, 8), (3, 5, 8), (2, 3, 5, 8), (2, 2, 3, 5, 8)]:
        q, k, v = (torch.randn(shape) for _ in range(3))
        for options in ({}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": torch.rand(5, 5) > 0.3}):
            expected = F.scaled_dot_product_attention(q, k, v, **options)
            torch.testing.assert_close(scaled_dot_product_attention(q, k, v, **options), expected)
    assert scaled_dot_product_attention(q, k, v, torch.zeros(5, 5, dtype=torch.bool)).abs().max() == 0
