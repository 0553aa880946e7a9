"""The Triton kernels of this family in Triton's interpreter; test_triton.py runs this file, in a process for it."""

from __future__ import annotations

import pytest
import torch

from tests.activation.cases import ACTIVATIONS, FLOATS, SHAPES, inputs
from tests.activation.on_triton import hold, results
from tests.emulation.triton_interpreter import interpret, round_as_hardware

round_as_hardware()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_contract(shape, dtype, activation):
    hold(interpret, shape, dtype, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_strides(activation):
    gate, up = inputs((4, 6, 24), torch.bfloat16)
    grad = torch.randn(4, 6, 24).bfloat16()
    expected = results(interpret, gate, up, grad, activation)
    halves = torch.cat([gate, up], -1).chunk(2, -1)
    swapped = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (gate, up, grad)]
    apart = [torch.stack([x, x], -1).flatten(-2)[..., ::2] for x in (gate, up, grad)]
    for given in ((*halves, grad), swapped, apart):
        for a, b in zip(results(interpret, *given, activation), expected, strict=True):
            assert torch.equal(a, b)
