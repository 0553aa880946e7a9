"""Gradients of gradients: exact in float64 by the reference's formulas, and through the operators in float32."""

from __future__ import annotations

import pytest
import torch

from llmkern import second_order
from llmkern.attention import op, reference
from llmkern.attention.mask import Mask
from llmkern.functional import attention_varlen
from tests.attention.cases import attend, differentiable, tensors

RULES = {
    "all": {},
    "causal": {"window_right": 0},
    "window": {"window_left": 2, "window_right": 1, "bottom_right": True, "key_lengths": torch.tensor([4])},
    "softcap": {"softcap": 1.5},
    "slopes": {"alibi_slopes": torch.tensor([0.5, 0.1])},
    "sink": {"learnable_sink": torch.randn(2, generator=torch.Generator().manual_seed(0))},
    "dropout": {"dropout_p": 0.3, "dropout_seed": torch.tensor(4)},
    "everything": {
        "window_left": 3, "bottom_right": True, "softcap": 2.0, "alibi_slopes": torch.tensor([0.5, 0.1]),
        "learnable_sink": torch.tensor([0.3, -0.2]), "dropout_p": 0.3, "dropout_seed": torch.tensor(4),
        "dense": torch.randn(1, 2, 4, 5, generator=torch.Generator().manual_seed(0)),
    },
}  # fmt: skip
SHAPE = (1, 2, 1, 4, 5, 3, 2)


class Exact(torch.autograd.Function):
    """What the operators do, by the reference alone, which takes float64 too."""

    @staticmethod
    def forward(ctx, query, key, value, rest):
        ctx.rest = rest
        output, sums = reference.attention(query, key, value, *rest)
        ctx.save_for_backward(query, key, value, output, sums)
        return output, sums

    @staticmethod
    def backward(ctx, grad_output, grad_sums):
        grads = ExactBackward.apply(grad_output, grad_sums, *ctx.saved_tensors, *ctx.rest, True)
        return *grads[:3], None


class ExactBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        second_order.setup(ctx, inputs, None)
        return reference.attention_backward(*inputs)

    backward = staticmethod(second_order.backward_of(reference.attention_backward))


@pytest.mark.parametrize("name", RULES)
def test_gradgradcheck_in_float64(name):
    described = Mask(
        **{k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in RULES[name].items()}
    )
    rest = (*described.arguments(), 0.6, False)
    inputs = tuple(t.requires_grad_() for t in tensors(SHAPE, torch.float64))
    seen = described.seen(4, 5, torch.device("cpu"))
    rows = torch.ones(4, dtype=torch.bool) if seen is None else seen.expand(1, 2, 4, 5).any(-1)[0, 0]

    def function(q, k, v):
        output, sums = Exact.apply(q, k, v, rest)
        return output, sums[:, :, rows]  # where there is something to sum

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def twice(function, inputs):
    """Gradients, and those of a number made of them."""
    results = function(*inputs)
    results = results if isinstance(results, tuple) else (results,)
    number = sum((r.float().sin()).sum() for r in results)
    first = torch.autograd.grad(number, inputs, create_graph=True)
    return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), inputs)]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("weights", [False, True])
def test_operators_in_float32(name, weights, isa):
    described, shape = Mask(**RULES[name]), (1, 2, 1, 4, 5, 8, 8)
    inputs = [t.requires_grad_() for t in tensors(shape)]

    def fast(q, k, v):
        output, sums = op.attention(q, k, v, described, 0.6)
        return (output, op.attention_weights(q, k, sums, described, 0.6)) if weights else output

    def plain(q, k, v):
        output, _, made = differentiable(q, k, v, described, 0.6)
        return (output, made) if weights else output

    for a, b in zip(twice(fast, inputs), twice(plain, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_masks_and_sinks_that_are_learnt():
    q, k, v = (t.requires_grad_() for t in tensors((2, 2, 2, 4, 5, 8, 8)))
    mask, sink = torch.randn(1, 2, 4, 5, requires_grad=True), torch.randn(2, requires_grad=True)
    inputs = [q, k, v, mask, sink]
    for options in ({}, {"weights": True}, {"logsumexp": True}):
        fast, plain = (attend(sink_grad=True, plain=p, **options) for p in (False, True))
        results = [twice(lambda q, k, v, m, s, f=f: f(q, k, v, m, sink=s, softcap=3.0), inputs) for f in (fast, plain)]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_one_tensor_for_all_three():
    (x, _, _) = tensors((1, 2, 2, 5, 5, 8, 8))
    x.requires_grad_()
    fast, plain = (twice(lambda x, p=p: attend(plain=p)(x, x, x, causal=True), [x]) for p in (False, True))
    for a, b in zip(fast, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_the_third_too():
    inputs = [t.requires_grad_() for t in tensors((1, 1, 1, 3, 4, 4, 4))]

    def third(function):
        (first,) = torch.autograd.grad(function(*inputs).sin().sum(), inputs[:1], create_graph=True)
        (again,) = torch.autograd.grad(first.sin().sum(), inputs[1:2], create_graph=True)
        return torch.autograd.grad(again.sin().sum(), inputs)

    for a, b in zip(third(attend()), third(attend(plain=True)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_sequences_end_to_end():
    q, k, v = (torch.randn(7, 2, 8, requires_grad=True) for _ in range(3))
    ends, sink = torch.tensor([0, 3, 7]), torch.randn(2, requires_grad=True)

    def packed(q, k, v, sink):
        return attention_varlen(q, k, v, ends, ends, is_causal=True, learnable_sink=sink, scale=8**-0.5)

    def one_by_one(q, k, v, sink):
        parts = []
        for a, b in ((0, 3), (3, 7)):
            one = (t[a:b].transpose(0, 1)[None] for t in (q, k, v))
            parts.append(attend(plain=True, sink_grad=True)(*one, causal=True, sink=sink)[0].transpose(0, 1))
        return torch.cat(parts)

    for a, b in zip(twice(packed, [q, k, v, sink]), twice(one_by_one, [q, k, v, sink]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
