"""The drop-in layer: the reference's constructor, state and results, and checkpoints both ways."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import llmkern
from llmkern import reference


@pytest.mark.parametrize("bias", [True, False])
def test_as_the_reference(bias, isa):
    torch.manual_seed(3)
    fast = llmkern.Int8Linear(40, 30, bias)
    torch.manual_seed(3)
    plain = reference.Int8Linear(40, 30, bias)
    assert list(fast.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(fast.state_dict().values(), plain.state_dict().values(), strict=True))
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 7, 40).to(dtype)
        assert torch.equal(fast(x), plain(x))


def test_checkpoints_load_both_ways():
    fast, plain = llmkern.Int8Linear(16, 8), reference.Int8Linear(16, 8)
    x = torch.randn(3, 16)
    fast(x)  # packs what is then replaced
    for one, other in ((plain, fast), (fast, plain)):
        one.weight.random_(-127, 127)
        other.load_state_dict(one.state_dict())
        assert torch.equal(fast(x), plain(x))


def test_a_checkpoint_of_a_linear_loads():
    linear, layer = nn.Linear(16, 8), llmkern.Int8Linear(16, 8)
    layer.load_state_dict(linear.state_dict())
    x = torch.randn(3, 16)
    assert torch.equal(layer(x), llmkern.Int8Linear.from_linear(linear)(x))
    assert (layer(x) - linear(x)).abs().max() < 0.05


def test_to_half_keeps_the_scales():
    layer, x = llmkern.Int8Linear(16, 8), torch.randn(3, 16)
    for changed in (layer.half(), layer.bfloat16(), layer.to(torch.float16)):
        assert changed.weight.dtype == torch.int8 and changed.weight_scale.dtype == torch.float32
        assert changed(x).dtype == torch.float32


def test_copies_and_pickles():
    layer, x = llmkern.Int8Linear(16, 8), torch.randn(3, 16)
    expected = layer(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), expected)
