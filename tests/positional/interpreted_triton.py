"""The Triton kernels of this family in Triton's interpreter; test_triton.py runs this file, in a process for it."""

from __future__ import annotations

import pytest
import torch

from llmkern.positional import reference, triton_launch
from llmkern.verify import verify
from tests.emulation.triton_interpreter import interpret, round_as_hardware, to_bf16
from tests.positional.cases import FLOATS, ROTARY, ROTARY_LAYOUTS, SINUSOIDAL, rotary_inputs, sinusoidal_inputs

round_as_hardware()
LAYOUTS = pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])


def rotate(interleaved=False, position_ids=None, inverse=False, inplace=False):
    def rotated(q, k, cos, sin):
        args = (q, k, cos, sin, position_ids, interleaved, inverse, inplace)
        outputs = triton_launch.rotary(interpret, *args)
        return outputs if k is not None else outputs[:1]

    return rotated


def plain(interleaved=False, position_ids=None, inverse=False):
    def rotated(q, k, cos, sin):
        sin = -sin if inverse else sin
        outputs = reference.rotary(q, k, cos, sin, interleaved=interleaved, position_ids=position_ids)
        return outputs if k is not None else outputs[:1]

    return rotated


def test_bf16_is_rounded_to_nearest():
    x = torch.cat([torch.randn(1000), torch.tensor([torch.inf, -torch.inf, torch.nan, 1.00390625, 1.01171875, 0.0])])
    rounded = torch.from_numpy(to_bf16(x.numpy()).view("int16")).view(torch.bfloat16)
    assert torch.equal(rounded.isnan(), x.isnan()) and torch.equal(rounded[~x.isnan()], x.bfloat16()[~x.isnan()])


@LAYOUTS
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", ROTARY.values(), ids=ROTARY)
def test_contract(shape, dtype, interleaved):
    inputs = rotary_inputs(shape, dtype)
    for inverse in (False, True):
        functions = rotate(interleaved, inverse=inverse), plain(interleaved, inverse=inverse)
        verify(*functions, inputs, gradients=False).raise_if_failed()


@LAYOUTS
def test_positions(interleaved):
    inputs = rotary_inputs((2, 3, 1, 6, 20, 12), torch.float32)
    for ids in (torch.randint(0, 11, (6,)), torch.randint(0, 11, (2, 6), dtype=torch.int32)):
        verify(rotate(interleaved, ids), plain(interleaved, ids), inputs, gradients=False).raise_if_failed()


@LAYOUTS
def test_a_position_outside_the_table_gives_nan_there_alone(interleaved):
    q, k, cos, sin = rotary_inputs((1, 2, 1, 3, 20, 12), torch.float32)
    out, _ = rotate(interleaved, torch.tensor([0, 8, -1]))(q, k, cos, sin)
    assert out[:, :, 1:, :12].isnan().all() and not out[:, :, 0].isnan().any()
    assert torch.equal(out[..., 12:], q[..., 12:])


@LAYOUTS
@pytest.mark.parametrize("layout", ROTARY_LAYOUTS.values(), ids=ROTARY_LAYOUTS)
def test_strides_and_in_place(layout, interleaved):
    q, k, cos, sin = rotary_inputs((2, 4, 2, 5, 24, 20), torch.float16)
    expected = rotate(interleaved)(q, k, cos, sin)
    a, b = layout(q), layout(k)
    for x, y in zip(rotate(interleaved)(a, b, cos, sin), expected, strict=True):
        assert torch.equal(x, y)
    returned = rotate(interleaved, inplace=True)(a, b, cos, sin)
    assert returned[0] is a and torch.equal(a, expected[0]) and torch.equal(b, expected[1])


@LAYOUTS
def test_every_tensor_has_strides_of_its_own(interleaved):
    q, k, cos, sin = rotary_inputs((2, 3, 2, 5, 24, 20), torch.float16)
    expected = rotate(interleaved)(q, k, cos, sin)
    for name, layout in ROTARY_LAYOUTS.items():
        for inputs in ((layout(q), k, cos, sin), (q, layout(k), cos, sin), (q, k, layout(cos[None, None])[0, 0], sin),
                       (q, k, cos, layout(sin[None, None])[0, 0])):  # fmt: skip
            for x, y in zip(rotate(interleaved)(*inputs), expected, strict=True):
                assert torch.equal(x, y), name


def test_nothing_is_written_outside():
    """The tensors lie in larger ones, whose other elements must stay."""
    q, k, cos, sin = rotary_inputs((1, 3, 2, 2, 10, 6), torch.float32)
    room = torch.full((1, 5, 4, 16), 7.0)
    inside = room[:, 1:4, 1:3, 3:13]
    inside.copy_(q)
    rotate(inplace=True)(inside, k, cos, sin)
    assert torch.equal(inside, plain()(q, k, cos, sin)[0])
    inside.fill_(7.0)
    assert (room == 7.0).all()


def add(x, pe, scale=1.0, dropout_p=0.0, seed=None):
    return triton_launch.sinusoidal_add(interpret, x, pe, seed, scale, dropout_p)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SINUSOIDAL.values(), ids=SINUSOIDAL)
def test_sinusoidal_contract(shape, dtype):
    inputs = sinusoidal_inputs(shape, dtype)
    for p, seed in ((0.0, None), (0.1, 3), (0.5, -1), (0.9, 2**62 + 5), (1.0, 7)):
        options = {"scale": 2.0, "dropout_p": p, "seed": None if seed is None else torch.tensor(seed)}
        verify(add, reference.sinusoidal_add, inputs, options, gradients=False).raise_if_failed()


def test_sinusoidal_without_an_encoding():
    """As the backward calls it."""
    x, _ = sinusoidal_inputs((5, 3, 37), torch.bfloat16)
    seed = torch.tensor(11)
    assert torch.equal(add(x, None, 0.5, 0.5, seed), x * 0.5 * reference.dropout_factor(x, 0.5, seed).to(x.dtype))


def test_sinusoidal_strides():
    x, pe = sinusoidal_inputs((6, 3, 20), torch.float16)
    expected = add(x, pe, 1.5)
    for layout in (lambda t: t.transpose(0, 1).contiguous().transpose(0, 1), lambda t: torch.cat([t, t], 2)[..., :20],
                   lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2]):  # fmt: skip
        assert torch.equal(add(layout(x), pe, 1.5), expected) and torch.equal(add(x, layout(pe), 1.5), expected)


def test_sinusoidal_writes_nothing_else():
    x, pe = sinusoidal_inputs((3, 2, 10), torch.float32)
    x[1, 0, 3], pe[2, 0, 1] = torch.nan, torch.inf
    out = add(x, pe)
    assert out[1, 0, 3].isnan() and out[2, :, 1].isinf().all() and out.isfinite().sum() == 60 - 3
