"""Bad input raises before any kernel runs, in eager mode and while tracing, and is named."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import llmkern
from llmkern import reference
from llmkern.functional import rotary
from llmkern.positional.op import sinusoidal_add
from tests.positional.bad_inputs import ROTARY, SINUSOIDAL, t

MODES = pytest.mark.parametrize("mode", ["eager", "fake"])


def raises(function, arguments, mode, error, words):
    if mode == "fake":
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        arguments = {k: fake.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(error) as raised:
        function(**arguments)
    assert all(word in str(raised.value) for word in words), str(raised.value)


@MODES
@pytest.mark.parametrize(("changed", "error", "words"), ROTARY.values(), ids=ROTARY)
def test_rotary(changed, error, words, mode):
    arguments = {"q": t(2, 4, 5, 8), "k": t(2, 2, 5, 8), "cos": t(6, 4), "sin": t(6, 4), **changed}
    raises(rotary, arguments, mode, error, words)


@MODES
@pytest.mark.parametrize(("changed", "error", "words"), SINUSOIDAL.values(), ids=SINUSOIDAL)
def test_sinusoidal_add(changed, error, words, mode):
    raises(sinusoidal_add, {"x": t(5, 2, 8), "pe": t(6, 1, 8), **changed}, mode, error, words)


@pytest.mark.parametrize("position", [-1, 6])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_position_outside_the_tables(position, inplace, isa):
    q = torch.ones(1, 1, 2, 8)
    ids = torch.tensor([0, position])
    with pytest.raises(ValueError, match=rf"position_ids: expected .* \[0, length\) with length = 6 .* got {position}"):
        rotary(q, None, t(6, 4), t(6, 4), position_ids=ids, inplace=inplace)
    assert torch.equal(q, torch.ones(1, 1, 2, 8))


@pytest.mark.parametrize("room", [llmkern, reference])
def test_modules(room):
    with pytest.raises(ValueError, match="dim: expected a positive even number, got 7"):
        room.RotaryEmbedding(7)
    with pytest.raises(ValueError, match="d_model: expected a positive integer, got 0"):
        room.PositionalEncoding(0)
    with pytest.raises(TypeError, match=r"max_len: expected a positive integer, got 2\.5"):
        room.PositionalEncoding(8, 2.5)
    encoding = room.PositionalEncoding(8, max_len=4)
    with pytest.raises(ValueError, match=r"x: expected .* max_len = 4"):
        encoding(t(5, 2, 8))
    with pytest.raises((ValueError, IndexError)):
        room.RotaryEmbedding(8, max_len=4)(t(1, 1, 3, 8), offset=2)
    with pytest.raises(ValueError, match=r"dropout: expected a probability in \[0, 1\], got 2"):
        llmkern.PositionalEncoding(8, dropout=2)
