"""The Triton kernels of this family in Triton's interpreter; test_triton.py runs this file, in a process for it."""

from __future__ import annotations

import pytest
import torch

from llmkern.norm import triton_launch
from tests.emulation.triton_interpreter import interpret, round_as_hardware
from tests.norm.cases import FLOATS, KINDS, LAYOUTS, SHAPES, inputs
from tests.norm.on_triton import hold_backward, hold_forward

round_as_hardware()
BOTH = pytest.mark.parametrize("centred", KINDS.values(), ids=KINDS)


@BOTH
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", [name for name in SHAPES if name != "many rows"])
def test_contract(name, dtype, centred):
    hold_forward(interpret, SHAPES[name], dtype, centred)
    hold_backward(interpret, SHAPES[name], dtype, centred)


@BOTH
def test_without_weights(centred):
    hold_forward(interpret, (5, 37), torch.bfloat16, centred, bare=True)
    hold_backward(interpret, (5, 37), torch.bfloat16, centred, bare=True)


@BOTH
def test_weights_in_float32_and_an_offset(centred):
    for dtype in FLOATS[1:]:
        hold_forward(interpret, (7, 40), dtype, centred, 1.0, torch.float32)
        hold_backward(interpret, (7, 40), dtype, centred, 1.0, torch.float32)


@BOTH
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strides(layout, centred):
    x, residual, weight, bias = inputs((4, 6, 24), torch.bfloat16)

    def results(x, residual, grad):
        out, total, statistics = triton_launch.norm(interpret, x, residual, weight, bias, 1e-5, 0.0, centred)
        grads = triton_launch.norm_backward(interpret, grad, residual, x, weight, statistics, 1e-5, 0.0, centred, True)
        return out, total, statistics, *grads

    grad = torch.randn(4, 6, 24).bfloat16()
    for a, b in zip(results(x, residual, grad), results(*map(layout, (x, residual, grad))), strict=True):
        assert torch.equal(a, b)


def test_the_widest_rows():
    for centred in (False, True):
        hold_forward(interpret, (2, triton_launch.WIDEST), torch.float32, centred)
        hold_backward(interpret, (3, triton_launch.WIDEST_BACKWARD), torch.float32, centred)
    assert "up to 16384 elements, not 16385" in triton_launch.limits(torch.empty(1, 16385), triton_launch.WIDEST)
