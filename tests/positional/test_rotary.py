"""Rotary embedding: the contract in both layouts, positions, in place, strides."""

from __future__ import annotations

import pytest
import torch

from llmkern.functional import rotary
from llmkern.positional import reference
from llmkern.verify import verify
from tests.positional.cases import FLOATS, ROTARY, ROTARY_LAYOUTS, rotary_inputs, rotate

LAYOUTS = pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])


@LAYOUTS
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", ROTARY.values(), ids=ROTARY)
def test_contract(shape, dtype, interleaved, isa):
    inputs = rotary_inputs(shape, dtype)
    verify(rotate(interleaved), rotate(interleaved, plain=True), inputs).raise_if_failed()


@LAYOUTS
@pytest.mark.parametrize("integers", [torch.int64, torch.int32])
def test_positions(interleaved, integers, isa):
    batch, length = 2, 17
    inputs = rotary_inputs(ROTARY["grouped heads"], torch.float32)
    for ids in (torch.randint(0, 22, (length,)), torch.randint(0, 22, (batch, length)), torch.arange(5, 22)):
        ids = ids.to(integers)
        verify(rotate(interleaved, ids), rotate(interleaved, ids, plain=True), inputs).raise_if_failed()
    spread = torch.stack([ids, ids], -1)[:, 0]  # strides of its own
    assert torch.equal(rotate(interleaved, spread)(*inputs)[0], rotate(interleaved, ids)(*inputs)[0])


def test_a_rotation_keeps_lengths_and_relative_angles():
    q, k, cos, sin = rotary_inputs((1, 1, 1, 12, 64, 64), torch.float32)
    q, k = (t[:, :, :1].expand(-1, -1, 12, -1).contiguous() for t in (q, k))
    for interleaved in (False, True):
        a, b = rotary(q, k, cos, sin, interleaved=interleaved)
        torch.testing.assert_close(a.norm(dim=-1), q.norm(dim=-1))
        scores = (a @ b.transpose(2, 3))[0, 0]
        for distance in (0, 3, -4):  # the same for all pairs of one distance
            torch.testing.assert_close(
                scores.diagonal(distance), scores.diagonal(distance)[:1].expand(12 - abs(distance))
            )


@LAYOUTS
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", ROTARY.values(), ids=ROTARY)
def test_in_place(shape, dtype, interleaved, isa):
    q, k, cos, sin = rotary_inputs(shape, dtype)
    expected = rotary(q, k, cos, sin, interleaved=interleaved)
    returned = rotary(q, k, cos, sin, interleaved=interleaved, inplace=True)
    assert returned[0] is q and returned[1] is k
    for x, y in zip((q, k), expected, strict=True):
        assert (x is None and y is None) or torch.equal(x, y)


def test_in_place_under_autograd():
    q, k, cos, sin = rotary_inputs((1, 2, 2, 5, 8, 8), torch.float32)
    leaves = [t.clone().requires_grad_() for t in (q, k)]
    doubled = [t * 2 for t in leaves]
    rotary(*doubled, cos, sin, inplace=True)
    grads = torch.autograd.grad([(t * t).sum() for t in doubled], leaves)
    for grad, leaf in zip(grads, (q, k), strict=True):
        torch.testing.assert_close(grad, 8 * leaf)  # a rotation keeps the square
    with pytest.raises(ValueError, match="inplace: expected False where q is a leaf"):
        rotary(leaves[0], None, cos, sin, inplace=True)
    with pytest.raises(ValueError, match="inplace: expected False where cos or sin requires a gradient"):
        rotary(q, k, cos.requires_grad_(), sin, inplace=True)


@LAYOUTS
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", ROTARY_LAYOUTS.values(), ids=ROTARY_LAYOUTS)
def test_strides(layout, dtype, interleaved, isa):
    q, k, cos, sin = rotary_inputs((2, 4, 2, 9, 48, 40), dtype)
    expected = rotary(q, k, cos, sin, interleaved=interleaved)
    a, b = layout(q), layout(k)
    for x, y in zip(rotary(a, b, cos, sin, interleaved=interleaved), expected, strict=True):
        assert torch.equal(x, y)
    rotary(a, b, cos, sin, interleaved=interleaved, inplace=True)
    assert torch.equal(a, expected[0]) and torch.equal(b, expected[1])


def test_tables_in_the_dtype_of_q(isa):
    q, k, cos, sin = rotary_inputs(ROTARY["usual"], torch.bfloat16)
    inputs = (q, k, cos.bfloat16(), sin.bfloat16())
    verify(rotate(), rotate(plain=True), inputs, gradients=False).raise_if_failed()


def test_a_wide_table_and_a_far_position(isa):
    q, k, _, _ = rotary_inputs((1, 2, 2, 3, 64, 64), torch.float32)
    cos, sin = reference.rotary_table(100_000, 64, 10000.0)
    ids = torch.tensor([99_999, 0, 65_536])
    verify(rotate(False, ids), rotate(False, ids, plain=True), (q, k, cos, sin), gradients=False).raise_if_failed()
