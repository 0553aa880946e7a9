"""Triton's attention weights and column sums in its interpreter; test_triton_weights.py runs this file, in a process
for it."""

from __future__ import annotations

import pytest
import torch

from llmkern import backend
from llmkern.attention import op, reference
from llmkern.attention.mask import Mask
from llmkern.attention.triton_configurations import Configuration
from llmkern.verify import verify
from tests.attention.cases import rule, tensors
from tests.attention.on_triton import serve
from tests.attention.weights_cases import column_sums, weights
from tests.emulation.triton_interpreter import interpret, round_as_hardware

round_as_hardware()
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
TILE = Configuration(32, 32, 4, 1)
# (B, H, Hkv, Sq, Sk, D, Dv)
SHAPES = {
    "one of everything": (1, 1, 1, 1, 1, 1, 1),
    "around tiles": (1, 1, 1, 33, 48, 16, 1),
    "more than a piece of keys": (1, 1, 1, 3, 261, 16, 1),
    "no keys": (1, 2, 2, 3, 0, 16, 1),
    "no queries": (1, 2, 2, 0, 5, 16, 1),
    "no heads": (2, 0, 0, 3, 5, 16, 1),
    "no width": (1, 2, 1, 5, 20, 0, 1),
}


@pytest.fixture(autouse=True)
def served(monkeypatch):
    serve(monkeypatch, interpret, tile=TILE)
    yield
    backend.forget_plans()


def compare(shape, dtype, rules, uniform=False):
    """The weights with their gradients, which those of the sums are too."""
    inputs = tensors(shape, dtype)[:2]
    for of in (weights, column_sums):
        functions = (of(uniform, plain) for plain in (False, True))
        verify(*functions, inputs, rules, gradients=of is weights).raise_if_failed()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape):
    compare(shape, torch.float32, {"causal": True} if shape[4] else {})


NAMES = [
    "lengths, bottom right", "boolean", "rows", "additive", "window, bottom right", "window to the right",
    "alibi of batches, bottom right", "sink, rows", "softcap",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_rules(name):
    """Each in one of the dtypes; with fewer keys than queries some rows stay empty, and are zeros or averages."""
    at = NAMES.index(name)
    shape = (2, 2, 1, 20, 50, 24, 1) if at % 2 else (2, 1, 1, 41, 19, 12, 1)
    dtype = FLOATS[at % 3]
    compare(shape, dtype, rule(name, shape, dtype), at // 2 % 2 == 0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_all_rules_together(dtype):
    shape = (2, 2, 1, 20, 50, 24, 1)
    compare(shape, dtype, rule("everything, additive", shape, dtype))


@pytest.mark.parametrize("name", ["lengths", "rows"])
def test_rows_without_keys_that_attend_to_all_alike(name):
    shape = (3, 2, 1, 9, 40, 16, 1)
    compare(shape, torch.float32, rule(name, shape), True)


def test_gradient_of_the_sink():
    shape = (2, 8, 4, 5, 20, 8, 1)
    functions = (weights(plain=plain, sink_grad=True) for plain in (False, True))
    verify(*functions, tensors(shape)[:2], rule("sink, rows", shape)).raise_if_failed()


def test_what_is_masked_has_no_part_and_what_is_seen_passes_through():
    q, k, _ = tensors((1, 2, 1, 9, 20, 16, 1))
    args = (Mask(window_right=0), 0.25)
    sums = op.attention(q, k, k, *args)[1]
    grad, gradients = torch.randn(1, 2, 9, 20), []
    for x in (0.0, torch.nan):
        leaves = [t.clone().requires_grad_() for t in (q, torch.cat([k[:, :, :9], torch.full_like(k[:, :, 9:], x)], 2))]
        gradients.append(torch.autograd.grad(op.attention_weights(*leaves, sums, *args), leaves, grad))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(b, a, rtol=2e-5, atol=2e-6)
    expected = op.attention_weights(q, k, sums, *args), op.attention_column_sums(q, k, sums, *args)
    k[:, :, 9:] = torch.nan
    found = op.attention_weights(q, k, sums, *args), op.attention_column_sums(q, k, sums, *args)
    assert all(map(torch.equal, found, expected))
    q[:, :, 7] = torch.nan  # sees the keys up to 7
    sums = op.attention(q, k, k, *args)[1]
    broken = op.attention_weights(q, k, sums, *args)
    assert (
        broken[:, :, 7, :8].isnan().all() and not broken[:, :, :7].isnan().any() and not broken[:, :, 8].isnan().any()
    )
    of_keys = op.attention_column_sums(q, k, sums, *args)
    assert of_keys[..., :8].isnan().all() and not of_keys[..., 8:].isnan().any()


def test_strides():
    q, k, _ = tensors((2, 2, 1, 20, 37, 16, 1))
    rules = (*Mask().arguments(), 0.2, False)
    sums = reference.attention(q, k, k, *rules)[1]
    expected = op.attention_weights(q, k, sums, Mask(), 0.2), op.attention_column_sums(q, k, sums, Mask(), 0.2)
    leaves, grad = [t.clone().requires_grad_() for t in (q, k)], torch.randn(2, 2, 1, 37).expand(2, 2, 20, 37)
    for layout in (
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t),
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        lambda t: torch.cat([t, t], -1)[..., 16:],
    ):
        args = layout(q), layout(k), sums.transpose(0, 1).contiguous().transpose(0, 1), Mask(), 0.2
        found = op.attention_weights(*args), op.attention_column_sums(*args)
        assert all(map(torch.equal, found, expected)) and found[0].is_contiguous()
    of_columns = torch.autograd.grad(op.attention_column_sums(*leaves, sums, Mask(), 0.2), leaves, grad[:, :, 0])
    of_weights = op.attention_weights(*leaves, sums, Mask(), 0.2)
    assert all(map(torch.equal, of_columns, torch.autograd.grad(of_weights, leaves, grad)))
