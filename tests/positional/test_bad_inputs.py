"""Bad input raises before any kernel runs, in eager mode and while tracing, and is named."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import llmkern
from llmkern import reference
from llmkern.functional import rotary
from llmkern.positional.op import sinusoidal_add
from tests.positional.bad_inputs import CONSTRUCTORS, ENCODING, ROTARY, ROTARY_MODULE, SINUSOIDAL, t

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


ROOMS = pytest.mark.parametrize("room", [llmkern, reference])


@ROOMS
@pytest.mark.parametrize(("changed", "error", "words"), ROTARY_MODULE.values(), ids=ROTARY_MODULE)
def test_rotary_embedding(changed, error, words, room):
    raises(
        room.RotaryEmbedding(8, max_len=6), {"q": t(2, 4, 5, 8), "k": t(2, 2, 5, 8), **changed}, "eager", error, words
    )


@ROOMS
@pytest.mark.parametrize(("x", "error", "words"), ENCODING.values(), ids=ENCODING)
def test_positional_encoding(x, error, words, room):
    raises(room.PositionalEncoding(8, max_len=4), {"x": x}, "eager", error, words)


@ROOMS
@pytest.mark.parametrize(("name", "arguments", "error", "words"), CONSTRUCTORS)
def test_constructors(name, arguments, error, words, room):
    raises(lambda: getattr(room, name)(*arguments), {}, "eager", error, words)


@pytest.mark.parametrize("argument", ["dropout", "scale"])
@pytest.mark.parametrize("value", [None, "a", True])
def test_what_the_drop_in_takes_besides(argument, value):
    with pytest.raises(TypeError, match=f"{argument}: expected a number, got {value!r}"):
        llmkern.PositionalEncoding(8, **{argument: value})
    with pytest.raises(ValueError, match=r"dropout: expected a probability in \[0, 1\], got 2"):
        llmkern.PositionalEncoding(8, dropout=2)
