"""Rotary embedding in place: the bits of the other way, nothing else written, and autograd."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmkern.positional import op, reference
from llmkern.verify import verify
from tests.positional.cases import ROTARY_LAYOUTS, rotary_inputs

BOTH = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


class DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@BOTH
@pytest.mark.parametrize("layout", ROTARY_LAYOUTS.values(), ids=ROTARY_LAYOUTS)
def test_strides_and_nothing_else_is_written(layout, interleaved, isa):
    q, k, cos, sin = rotary_inputs((2, 4, 2, 21, 40, 24), torch.float32)
    expected = op.rotary(q, k, cos, sin, interleaved=interleaved)
    views = [layout(t) for t in (q, k)]
    memory = [v._base if v._base is not None else v for v in views]
    before = [m.clone() for m in memory]
    ids = torch.arange(21).expand(2, 21)
    op.rotary(*views, cos, sin, interleaved=interleaved, position_ids=ids, inplace=True)
    for view, expected_view in zip(views, expected, strict=True):
        assert torch.equal(view, expected_view)
    for view, old in zip(views, (q, k), strict=True):
        view.copy_(old)
    for m, b in zip(memory, before, strict=True):
        assert torch.equal(m, b)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autograd(dtype, interleaved, isa):
    q, k, cos, sin = rotary_inputs((2, 3, 1, 9, 20, 16), dtype)
    inputs = (q.requires_grad_(), k.requires_grad_(), cos, sin)
    kwargs = {"interleaved": interleaved}
    verify(lambda *t, **o: op.rotary(*t, **o, inplace=True), reference.rotary, inputs, kwargs).raise_if_failed()


def test_a_value_that_the_backward_needs_is_guarded(isa):
    """Overwriting what an earlier operation kept is an error of torch's, as with any operation in place."""
    leaf, _, cos, sin = rotary_inputs((1, 2, 2, 4, 8, 8), torch.float32)
    q = leaf.requires_grad_() * 1.0
    squared = q.square()
    op.rotary(q, None, cos, sin, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.sum().backward()


def test_under_no_grad_leaves_are_rotated(isa):
    q, k, cos, sin = rotary_inputs((1, 2, 2, 4, 8, 8), torch.float32)
    expected = op.rotary(q, k, cos, sin)
    with torch.no_grad():
        op.rotary(q.requires_grad_(), k, cos, sin, inplace=True)
    assert torch.equal(q, expected[0]) and torch.equal(k, expected[1])


def test_the_version_counts(isa):
    """Autograd sees the write: a tensor kept before it cannot be used after it."""
    q, k, cos, sin = rotary_inputs((1, 2, 2, 4, 8, 8), torch.float32)
    for call in (
        lambda: op.rotary(q, k, cos, sin, inplace=True),
        lambda: torch.ops.llmkern.rotary_(q, k, cos, sin, None, False, False),
    ):
        products = [torch.randn_like(t, requires_grad=True) * t for t in (q, k)]
        call()
        for product in products:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                product.sum().backward()


def test_in_inference_mode(isa):
    q, k, cos, sin = rotary_inputs((1, 2, 2, 4, 8, 8), torch.float32)
    expected = op.rotary(q, k, cos, sin)
    with torch.inference_mode():
        made = [t.clone() for t in (q, k)]
        for a, b in zip(op.rotary(*made, cos, sin, inplace=True), expected, strict=True):
            assert torch.equal(a, b)


def test_refused(isa):
    q, k, cos, sin = rotary_inputs((2, 2, 2, 4, 8, 8), torch.float32)
    for arguments, words in [
        ((q.clone().requires_grad_(), k, cos, sin), "q is a leaf that requires a gradient"),
        ((q, k.clone().requires_grad_(), cos, sin), "k is a leaf that requires a gradient"),
        ((q, k, cos.clone().requires_grad_(), sin), "cos or sin requires a gradient"),
        ((q[:1].expand_as(q), k, cos, sin), "q: expected elements with memory of their own"),
        ((q, k[:, :1].expand_as(k), cos, sin), "k: expected elements with memory of their own"),
        ((q.as_strided((2, 2, 4, 8), (8, 32, 4, 1)), k, cos, sin), "q: expected elements with memory of their own"),
    ]:
        before = [t.clone() for t in arguments]
        with pytest.raises(ValueError, match=words):
            op.rotary(*arguments, inplace=True)
        assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


@pytest.mark.parametrize("way", ["short", "dispatched", "recorded", "negated"])
def test_shared_memory_is_refused(way, isa):
    q, _, cos, sin = rotary_inputs((2, 6, 6, 4, 8, 8), torch.float32)
    if way == "recorded":
        q = q.requires_grad_() * 1.0
    if way == "negated":
        q = torch.randn(2, 6, 4, 8, dtype=torch.complex64).conj().imag
    before = q.clone()
    mode = DispatchMode() if way == "dispatched" else contextlib.nullcontext()
    for a, b in ((q, q), (q[:, :4], q[:, 2:]), (q[:, :4], q[:, 3:4]), (q[:, :, :, :5], q[:, :3, :, 3:])):
        with mode, pytest.raises(ValueError, match="k: expected memory of its own, apart from that of q"):
            op.rotary(a, b, cos[:, :2], sin[:, :2], inplace=True)
        assert torch.equal(q, before)
    expected = op.rotary(before[:, :4], before[:, 4:], cos, sin)
    with mode:
        op.rotary(q[:, :4], q[:, 4:], cos, sin, inplace=True)
    assert torch.equal(q[:, :4], expected[0]) and torch.equal(q[:, 4:], expected[1])


def test_heads_of_one_projection(isa):
    fused = torch.randn(2, 9, 3, 4, 16)
    before, (_, _, cos, sin) = fused.clone(), rotary_inputs((2, 4, 4, 9, 16, 16), torch.float32)
    expected = op.rotary(*(t.transpose(1, 2) for t in before.unbind(2)[:2]), cos, sin)
    op.rotary(*(t.transpose(1, 2) for t in fused.unbind(2)[:2]), cos, sin, inplace=True)
    for i in (0, 1):
        assert torch.equal(fused[:, :, i].transpose(1, 2), expected[i])
    assert torch.equal(fused[:, :, 2], before[:, :, 2])


def test_a_bad_position_changes_nothing(isa):
    q, k, cos, sin = rotary_inputs((2, 2, 2, 4, 8, 8), torch.float32)
    before = q.clone(), k.clone()
    with pytest.raises(ValueError, match="position_ids"):
        op.rotary(q, k, cos, sin, position_ids=torch.tensor([0, 1, 2, 9]), inplace=True)
    assert torch.equal(q, before[0]) and torch.equal(k, before[1])
