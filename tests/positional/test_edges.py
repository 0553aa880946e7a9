"""What the kernels must keep bit for bit, and shapes whose strides mean nothing."""

from __future__ import annotations

import pytest
import torch

from llmkern.positional import op, reference
from llmkern.verify import verify
from tests.positional.cases import FLOATS, ROTARY_LAYOUTS, rotary_inputs, rotate
from tests.test_random import KNOWN

BOTH = pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])


def test_a_width_of_1_with_any_stride(isa):
    """contiguous() leaves such a tensor as it is: it must not be asked for again and again."""
    x, pe = torch.randn(9, 3, 4)[..., 1:2], torch.randn(9, 1, 1)
    strided = torch.as_strided(pe, pe.shape, (1, 1, 7))
    assert torch.equal(op.sinusoidal_add(torch.as_strided(x, x.shape, (12, 4, 5)), strided), torch.as_strided(
        x, x.shape, (12, 4, 1)) + pe)  # fmt: skip
    q, k, cos, sin = rotary_inputs((1, 2, 2, 9, 4, 2), torch.float32)
    columns = (torch.as_strided(t, t.shape, (1, 5)) for t in (cos, sin))
    for a, b in zip(op.rotary(q, k, *columns), op.rotary(q, k, cos, sin), strict=True):
        assert torch.equal(a, b)


def test_tables_with_any_strides(isa):
    q, k, cos, sin = rotary_inputs((1, 2, 2, 9, 16, 16), torch.float32)
    expected = op.rotary(q, k, cos, sin)
    columns = [t.t().contiguous().t() for t in (cos, sin)]
    for c, s in (columns, torch.stack([cos, sin], 1).unbind(1), (cos, columns[1])):
        for a, b in zip(op.rotary(q, k, c, s), expected, strict=True):
            assert torch.equal(a, b)


@BOTH
def test_expanded(interleaved, isa):
    q, k, cos, sin = rotary_inputs((3, 4, 4, 9, 16, 16), torch.float32)
    expanded = (q[:1, :1].expand_as(q), k[:, :, :1].expand_as(k), cos[:1].expand_as(cos), sin[:, :1].expand_as(sin))
    for a, b in zip(rotate(interleaved)(*expanded), rotate(interleaved)(*map(torch.clone, expanded)), strict=True):
        assert torch.equal(a, b)


@BOTH
@pytest.mark.parametrize("layout", ROTARY_LAYOUTS.values(), ids=ROTARY_LAYOUTS)
def test_gradients_of_strided_tensors(layout, interleaved, isa):
    """The backward is the rotation by the opposite angles, bit for bit, whatever the strides."""
    q, k, cos, sin = rotary_inputs((2, 4, 2, 21, 40, 24), torch.float32)
    leaves = [layout(t).detach().requires_grad_() for t in (q, k)]
    grads = [layout(torch.randn_like(t)) for t in (q, k)]
    got = torch.autograd.grad(rotate(interleaved)(*leaves, cos, sin), leaves, grads)
    for a, b in zip(got, rotate(interleaved)(*map(torch.clone, grads), cos, -sin), strict=True):
        assert torch.equal(a, b)


@BOTH
def test_a_rotated_row_depends_on_nothing_around_it(interleaved, isa):
    q, k, cos, sin = rotary_inputs((3, 6, 2, 70, 64, 64), torch.float32)
    whole = rotate(interleaved)(q, k, cos, sin)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for a, b in zip(rotate(interleaved)(q, k, cos, sin), whole, strict=True):
            assert torch.equal(a, b)
    finally:
        torch.set_num_threads(threads)
    part = rotate(interleaved)(q[1:2, 2:3, :33], k[1:2, :1, :33], cos, sin)
    assert torch.equal(part[0], whole[0][1:2, 2:3, :33]) and torch.equal(part[1], whole[1][1:2, :1, :33])


@BOTH
def test_what_is_not_finite_stays_in_its_pair(interleaved, isa):
    q, k, cos, sin = rotary_inputs((1, 2, 2, 9, 40, 34), torch.float32)
    q[0, 1, 4, 3], k[0, 0, 2, 33], k[0, 1, 8, 39] = torch.nan, torch.inf, torch.nan
    inputs = (q, k, cos, sin)
    verify(rotate(interleaved), rotate(interleaved, plain=True), inputs, gradients=False).raise_if_failed()


def test_the_kernel_gives_the_published_words(isa):
    """Seed 0, row 0, columns 0 to 3 are the first vector: an element is dropped just above its word / 2^32."""
    x, pe = torch.ones(1, 1, 4), torch.zeros(1, 1, 4)
    for i, word in enumerate(KNOWN[0][2]):
        for dropped, p in ((True, (word + 1) / 2.0**32), (False, word / 2.0**32)):
            assert (op.sinusoidal_add(x, pe, dropout_p=p, seed=0)[0, 0, i] == 0) == dropped


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63)])
def test_one_mask_for_every_dtype_and_stride(seed, isa):
    expected = reference.dropout_factor(torch.ones(13, 5, 70), 0.3, seed) == 0
    for dtype in FLOATS:
        for x in (torch.ones(13, 5, 70, dtype=dtype), torch.ones(5, 13, 70, dtype=dtype).transpose(0, 1)):
            assert torch.equal(op.sinusoidal_add(x, torch.zeros(13, 1, 70), dropout_p=0.3, seed=seed) == 0, expected)


def test_the_backward_uses_the_mask_of_its_forward(isa):
    x, pe = torch.ones(30, 3, 64, requires_grad=True), torch.zeros(30, 1, 64)
    out = op.sinusoidal_add(x, pe, scale=2.0, dropout_p=0.4)
    op.sinusoidal_add(x, pe, dropout_p=0.4)  # another draw in between
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())
