"""The operators as torch sees them: opcheck, compile, export, autocast, forward mode, vmap's refusal."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck
from torch.nn import functional as F

import llmkern
from llmkern.functional import scaled_dot_product_attention
from tests.attention.cases import attend, tensors

OPS = torch.ops.llmkern
REST = (None, None, True, False, 0.25, False)


def test_opcheck():
    q, k, v = (t.requires_grad_() for t in tensors((2, 4, 2, 5, 7, 16, 12)))
    mask = torch.randn(1, 4, 5, 7, requires_grad=True)
    lengths = torch.tensor([7, 3])
    opcheck(OPS.attention, (q, k, v, *REST))
    opcheck(OPS.attention, (q, k, v, mask, lengths, False, False, 0.25, True))
    output, logsumexp = (t.detach() for t in OPS.attention(q, k, v, *REST))
    q, k, v = (t.detach() for t in (q, k, v))
    opcheck(OPS.attention_backward, (output, q, k, v, output, logsumexp, *REST, False))
    opcheck(OPS.attention_weights, (q.requires_grad_(), k, logsumexp, *REST))
    opcheck(OPS.attention_weights_backward, (torch.randn(2, 4, 5, 7), q.detach(), k, logsumexp, *REST, False))


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


def test_a_gradient_of_a_gradient_is_refused():
    q, k, v = (t.requires_grad_() for t in tensors((1, 1, 1, 3, 3, 8, 8)))
    (grad,) = torch.autograd.grad(attend()(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="gradient of a gradient"):
        grad.sum().backward()


def test_forward_mode_is_refused():
    q, k, v = tensors((1, 1, 1, 3, 3, 8, 8))
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda q: attend()(q, k, v), (q,), (q,))


def test_torchs_signature_and_ranks():
    for shape in [(5, 8), (3, 5, 8), (2, 3, 5, 8), (2, 2, 3, 5, 8)]:
        q, k, v = (torch.randn(shape) for _ in range(3))
        for options in ({}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": torch.rand(5, 5) > 0.3}):
            expected = F.scaled_dot_product_attention(q, k, v, **options)
            torch.testing.assert_close(scaled_dot_product_attention(q, k, v, **options), expected)
    assert scaled_dot_product_attention(q, k, v, torch.zeros(5, 5, dtype=torch.bool)).abs().max() == 0


def test_dropout_is_torchs_and_says_so_once():
    q, k, v = tensors((1, 2, 2, 6, 6, 8, 8))
    from llmkern.attention import sdpa

    sdpa._warned = False
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match="dropout_p > 0 runs torch's own attention"):
        output = scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    torch.manual_seed(3)
    assert torch.equal(output, F.scaled_dot_product_attention(q, k, v, dropout_p=0.5))
