"""Bad input raises before any kernel runs, in eager mode and while tracing, and is named."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import llmkern
from llmkern import reference
from llmkern.functional import int8_linear
from tests.int8.bad_inputs import CASES, t


@pytest.mark.parametrize("mode", ["eager", "fake"])
@pytest.mark.parametrize(("changed", "error", "words"), CASES.values(), ids=CASES)
def test_int8_linear(changed, error, words, mode):
    arguments = {"x": t(2, 8), "weight": t(4, 8, dtype=torch.int8), "weight_scale": t(4), **changed}
    if mode == "fake":
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        arguments = {k: fake.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(error) as raised:
        int8_linear(**arguments)
    assert all(word in str(raised.value) for word in words), str(raised.value)


@pytest.mark.parametrize("room", [llmkern, reference])
def test_module(room):
    layer = room.Int8Linear(8, 4)
    for x, error, message in [
        (t(2, 7), ValueError, r"x: expected \(\.\.\., K\) with K = 8"),
        (t(2, 8).int(), TypeError, "x: expected dtype float32 or bfloat16 or float16.*, got int32"),
        (t(2, 8, device="meta"), ValueError, "weight: expected the device of x, meta"),
    ]:
        with pytest.raises(error, match=message):
            layer(x)
    for arguments, error, message in [
        (("a", 4), TypeError, "in_features: expected an integer, got 'a'"),
        ((4, -1), ValueError, "out_features: expected 0 or more, got -1"),
        ((8, 5, "a"), TypeError, "bias: expected True or False, got 'a'"),
        ((2**70, 4), ValueError, "in_features: expected an integer of 64 bits"),
        ((4, 4, True, None, torch.float64), TypeError, "dtype: expected float32 .* got torch.float64"),
    ]:
        with pytest.raises(error, match=message):
            room.Int8Linear(*arguments)


def test_float64_is_the_plain_versions_alone():
    with pytest.raises(TypeError, match="x: expected dtype float32 or bfloat16 or float16, got float64"):
        llmkern.Int8Linear(8, 4)(t(2, 8).double())
    assert reference.Int8Linear(8, 4).double()(t(2, 8).double()).dtype == torch.float64
