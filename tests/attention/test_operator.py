"""The operators as torch sees them: opcheck, compile, export, autocast, forward mode, vmap's refusal."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.library import opcheck
from torch.nn import functional as F

import llmkern
from llmkern.attention.mask import Mask
from llmkern.attention.op import attention_column_sums
from llmkern.functional import scaled_dot_product_attention
from llmkern.verify.report import judge_row
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


SHAPES_OF_TORCH = {
    "three dimensions, grouped": ((8, 5, 16), (2, 7, 16), (2, 7, 16), True),
    "leading dimensions broadcast": ((1, 1, 4, 5, 16), (2, 3, 4, 7, 16), (1, 3, 4, 7, 16), False),
    "a batch of one": ((1, 4, 5, 16), (3, 4, 7, 16), (3, 4, 7, 16), False),
    "one key head": ((2, 4, 5, 16), (2, 1, 7, 16), (2, 1, 7, 16), False),
    "one query head": ((2, 1, 5, 16), (2, 4, 7, 16), (2, 4, 7, 16), False),
    "one value head": ((2, 4, 5, 16), (2, 4, 7, 16), (2, 1, 7, 16), False),
    "keys and values grouped apart": ((2, 8, 5, 16), (2, 4, 7, 16), (2, 2, 7, 16), True),
}


@pytest.mark.parametrize("case", SHAPES_OF_TORCH.values(), ids=SHAPES_OF_TORCH)
def test_shapes_that_torch_takes(case):
    *shapes, grouped = case
    q, k, v = (torch.randn(s) for s in shapes)
    for options in ({}, {"is_causal": True}, {"attn_mask": torch.rand(5, 7) > 0.3}):
        expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped, **options)
        found = scaled_dot_product_attention(q, k, v, enable_gqa=grouped, **options)
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected)
        assert torch.equal(found, scaled_dot_product_attention(q, k, v, enable_gqa=grouped, **options))


def test_autocast_is_torchs():
    q, k, v = tensors((2, 4, 4, 5, 7, 16, 16))
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = scaled_dot_product_attention(q, k.bfloat16(), v), F.scaled_dot_product_attention(q, k, v)
        for dtype in (torch.float16, torch.float32, torch.bfloat16):
            assert torch.equal(scaled_dot_product_attention(q, k, v, torch.zeros(5, 7, dtype=dtype)), found)
    truth = F.scaled_dot_product_attention(*(t.bfloat16().double() for t in (q, k, v)))
    assert found.dtype == expected.dtype == torch.bfloat16
    assert judge_row("attention", "output", found, expected, truth).passed


def test_meta_tensors():
    q = torch.empty(2, 4, 5, 16, device="meta")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the fallback says so
        assert scaled_dot_product_attention(q, q, q, is_causal=True).is_meta
