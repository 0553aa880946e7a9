"""The drop-in modules: the reference's constructor, state and results, and checkpoints both ways."""

from __future__ import annotations

import pytest
import torch

import llmkern
from llmkern import reference
from llmkern.verify import verify


@pytest.mark.parametrize("width", [16, 17])
def test_positional_encoding(width, isa):
    fast, plain = llmkern.PositionalEncoding(width, 50), reference.PositionalEncoding(width, 50)
    assert list(fast.state_dict()) == list(plain.state_dict()) == ["pe"]
    assert torch.equal(fast.pe, plain.pe)
    verify(fast, plain, torch.randn(50, 2, width)).raise_if_failed()


def test_checkpoints_load_both_ways():
    fast, plain = llmkern.PositionalEncoding(8, 20), reference.PositionalEncoding(8, 20)
    changed = {"pe": torch.randn(20, 1, 8)}
    for one, other in ((fast, plain), (plain, fast)):
        one.load_state_dict(changed)
        other.load_state_dict(one.state_dict())
        x = torch.randn(5, 2, 8)
        assert torch.equal(other(x), x + changed["pe"][:5])


def test_half_precision_model(isa):
    fast = llmkern.PositionalEncoding(32).bfloat16()
    verify(fast, reference.PositionalEncoding(32).bfloat16(), torch.randn(9, 2, 32).bfloat16()).raise_if_failed()


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_is_that_of_torchs_sum(dtype, state, isa):
    fast, plain = llmkern.PositionalEncoding(32).to(state), reference.PositionalEncoding(32).to(state)
    x = torch.randn(9, 2, 32).to(dtype)
    assert fast(x).dtype == plain(x).dtype == (dtype if dtype == state else torch.float32)
    verify(fast, plain, x).raise_if_failed()


def test_dropout_in_training_alone():
    module, x = llmkern.PositionalEncoding(64, dropout=0.5), torch.randn(30, 4, 64)
    assert (module(x) == 0).float().mean() > 0.4
    assert torch.equal(module.eval()(x), reference.PositionalEncoding(64)(x))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_embedding(interleaved, isa):
    fast, plain = (room.RotaryEmbedding(24, 40, interleaved=interleaved) for room in (llmkern, reference))
    assert fast.state_dict() == plain.state_dict() == {}
    q, k = torch.randn(2, 4, 7, 32), torch.randn(2, 2, 7, 32)
    ids = torch.randint(0, 30, (2, 7))
    for kwargs in ({}, {"offset": 33}, {"position_ids": ids}, {"position_ids": ids[0], "offset": 3}):
        verify(fast, plain, (q, k), kwargs).raise_if_failed()
    assert fast(q)[1] is None


def test_decoding_one_by_one_gives_the_same(isa):
    rotary = llmkern.RotaryEmbedding(32)
    q = torch.randn(1, 2, 6, 32)
    steps = [rotary(q[:, :, i : i + 1], offset=i)[0] for i in range(6)]
    assert torch.equal(torch.cat(steps, 2), rotary(q)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_rotary_under_autocast_is_rotary(autocast, dtype, isa):
    fast, plain = llmkern.RotaryEmbedding(8, 20), reference.RotaryEmbedding(8, 20)
    q, k = torch.randn(2, 4, 7, 16).to(dtype), torch.randn(2, 2, 7, 16).to(dtype)
    expected = plain(q, k)
    with torch.autocast("cpu", autocast):
        assert all(torch.equal(x, y) for x, y in zip(plain(q, k), expected, strict=True))
        verify(fast, plain, (q, k)).raise_if_failed()


@pytest.mark.parametrize("room", [llmkern, reference])
@pytest.mark.parametrize("bad", [-1, 20])
def test_positions_of_samples_are_checked_too(room, bad):
    """Under vmap their values are known, whether the samples have positions of their own or share them."""
    rotary, q, ids = room.RotaryEmbedding(8, 20), torch.randn(3, 2, 4, 5, 8), torch.arange(5).expand(3, 5).clone()
    turned = torch.func.vmap(lambda x, i: rotary(x, None, i)[0])(q, ids)
    assert torch.allclose(turned, torch.stack([rotary(x, None, ids[0])[0] for x in q]))
    ids[1, 2] = bad
    with pytest.raises(ValueError, match=rf"position_ids: expected values in \[0, length\) .* got {bad}"):
        torch.func.vmap(lambda x, i: rotary(x, None, i)[0])(q, ids)
    with pytest.raises(ValueError, match=rf"position_ids: expected values in \[0, length\) .* got {bad}"):
        torch.func.vmap(lambda x: rotary(x, None, ids[1])[0])(q)


@pytest.mark.parametrize("scale", [float("inf"), float("nan"), 10**400])
def test_a_scale_that_is_not_finite_is_named(scale):
    with pytest.raises(ValueError, match="scale: expected a finite number, got"):
        llmkern.PositionalEncoding(8, scale=scale)
