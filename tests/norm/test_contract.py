"""LayerNorm and RMSNorm: the contract with gradients, layouts, and what a row may depend on."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from llmkern.norm import op, reference
from llmkern.verify import verify
from tests.norm.cases import FLOATS, KINDS, LAYOUTS, SHAPES, inputs, normalise, public

BOTH = pytest.mark.parametrize("centred", KINDS.values(), ids=KINDS)


@BOTH
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_contract(shape, dtype, centred, isa):
    given = inputs(shape, dtype)
    verify(normalise(centred), normalise(centred, plain=True), given).raise_if_failed()
    verify(normalise(centred), normalise(centred, plain=True), (given[0], None, None, None)).raise_if_failed()


@BOTH
@pytest.mark.parametrize("dtype", FLOATS)
def test_what_may_be_left_out(dtype, centred, isa):
    x, residual, weight, bias = inputs((6, 40), dtype)
    for given in (
        (x, None, weight, bias),
        (x, residual, None, None),
        (x, None, weight, None),
        (x, residual, None, bias),
    ):
        verify(normalise(centred), normalise(centred, plain=True), given).raise_if_failed()


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_float32(dtype, centred, isa):
    given = inputs((9, 37), dtype, torch.float32)
    verify(normalise(centred), normalise(centred, plain=True), given).raise_if_failed()


@pytest.mark.parametrize("dtype", FLOATS)
def test_an_offset_of_the_weights(dtype, isa):
    x, residual, weight, _ = inputs((9, 37), dtype)
    given = (x, residual, weight, None)
    for eps in (1e-6, 0.5):
        functions = (normalise(False, plain, eps, 1.0) for plain in (False, True))
        verify(*functions, given).raise_if_failed()


@BOTH
def test_the_reference_is_torchs(centred):
    x, _, weight, bias = inputs((9, 37), torch.float64)
    got = normalise(centred, plain=True)(x, None, weight, bias)
    ours = F.layer_norm(x, (37,), weight, bias, 1e-5) if centred else F.rms_norm(x, (37,), weight, 1e-5) + bias
    assert torch.allclose(got, ours, rtol=1e-14, atol=1e-14)
    mean, scale = reference.norm(x, None, weight, bias, 1e-5, 0.0, centred)[2].unbind(-1)
    y = (x - mean[:, None]) * scale[:, None] * weight + bias
    assert torch.allclose(y, ours, rtol=1e-13, atol=1e-13)


@BOTH
def test_rows_far_from_zero(centred, isa):
    """Their variance is what is left of large numbers."""
    x = torch.randn(20, 300) + 1000.0
    verify(normalise(centred), normalise(centred, plain=True), (x, None, None, None)).raise_if_failed()


@BOTH
def test_constant_rows(centred, isa):
    x = torch.tensor([0.0, 3.0, -1e4, 1e-20])[:, None].expand(4, 50).contiguous()
    verify(normalise(centred), normalise(centred, plain=True), (x, None, None, None), gradients=False).raise_if_failed()


@BOTH
def test_what_is_not_finite_stays_in_its_row(centred, isa):
    x, residual, weight, bias = inputs((6, 21), torch.float32)
    x[1, 3], x[2, 20], residual[4, 0] = torch.nan, torch.inf, -torch.inf
    functions = normalise(centred), normalise(centred, plain=True)
    verify(*functions, (x, residual, weight, bias), gradients=False).raise_if_failed()
    out, _ = functions[0](x, residual, weight, bias)
    assert out[[0, 3, 5]].isfinite().all() and not out[[1, 2, 4]].isfinite().all(1).any()


@BOTH
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strides(layout, dtype, centred, isa):
    """Bit for bit, the gradients too."""
    x, residual, weight, bias = inputs((4, 6, 24), dtype)
    weight, bias = (torch.stack([t, t], -1).flatten()[::2] for t in (weight, bias))
    plain = [t.clone().requires_grad_() for t in (x, residual, weight.contiguous(), bias.contiguous())]
    strided = [layout(x).detach().requires_grad_(), layout(residual).detach().requires_grad_(),
               weight.detach().requires_grad_(), bias.detach().requires_grad_()]  # fmt: skip
    grads = [torch.randn_like(x) for _ in range(2)]
    expected, got = normalise(centred)(*plain), normalise(centred)(*strided)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    before = torch.autograd.grad(expected, plain, grads)
    after = torch.autograd.grad(got, strided, [layout(g) for g in grads])
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@BOTH
def test_a_row_depends_on_nothing_around_it(centred, isa):
    x, residual, weight, bias = inputs((150, 600), torch.float32)
    leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]
    grads = [torch.randn_like(x) for _ in range(2)]
    whole = normalise(centred)(*leaves)
    of_whole = torch.autograd.grad(whole, leaves, grads)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        again = normalise(centred)(*leaves)
        of_again = torch.autograd.grad(again, leaves, grads)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip((*whole, *of_whole), (*again, *of_again), strict=True):
        assert torch.equal(a, b)
    part = normalise(centred)(x[70:75], residual[70:75], weight, bias)
    assert all(torch.equal(a, b[70:75]) for a, b in zip(part, whole, strict=True))


@BOTH
def test_the_public_functions(centred, isa):
    x, residual, weight, bias = inputs((6, 40), torch.float32)
    bias = bias if centred else None
    for _ in range(2):  # by the plan that was made, and by the one that was kept
        for with_gradients in (False, True):
            given = [
                None if t is None else t.clone().requires_grad_(with_gradients) for t in (x, residual, weight, bias)
            ]
            for got, expected in zip(public(centred)(*given), normalise(centred)(*given), strict=True):
                assert torch.equal(got, expected) and got.requires_grad == with_gradients
            assert torch.equal(
                public(centred)(given[0], None, *given[2:]), normalise(centred)(given[0], None, *given[2:])
            )


def test_only_the_total_goes_on():
    """The gradient of the normalised rows is then none, not zeros that have to be made."""
    x, residual, weight, _ = (t.requires_grad_() for t in inputs((6, 40), torch.float32))
    _, total = op.rms_norm(x, weight, residual=residual)
    grads = torch.autograd.grad(total.sum(), (x, residual, weight), allow_unused=True)
    assert torch.equal(grads[0], torch.ones_like(x)) and torch.equal(grads[1], grads[0]) and grads[2] is None
