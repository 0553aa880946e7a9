"""The PTX of the Triton kernels that work row by row, norms and gated activations, against the references."""

from __future__ import annotations

import pytest
import torch

from tests.activation.cases import ACTIVATIONS
from tests.activation.on_triton import hold
from tests.emulation.triton_on_ptx import Emulated
from tests.norm.cases import KINDS
from tests.norm.on_triton import hold_backward, hold_forward

pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux)")
CAPABILITIES = pytest.mark.parametrize("capability", [80, 90])
BOTH = pytest.mark.parametrize("centred", KINDS.values(), ids=KINDS)
SHAPES = [(5, 64), (3, 7, 37), (2, 1030)]


@CAPABILITIES
@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms(dtype, centred, capability):
    for shape, schedule in zip(SHAPES, ("lockstep", "reverse", "random"), strict=True):
        run = Emulated(capability, schedule)
        hold_forward(run, shape, dtype, centred)
        hold_backward(run, shape, dtype, centred)
        assert len(run.reports) >= 2
    hold_forward(Emulated(capability), (5, 64), dtype, centred, bare=True)
    hold_backward(Emulated(capability), (5, 64), dtype, centred, bare=True)


@BOTH
def test_norms_with_an_offset_and_weights_in_float32(centred):
    hold_forward(Emulated(), (9, 40), torch.bfloat16, centred, 1.0, torch.float32)
    hold_backward(Emulated(), (9, 40), torch.bfloat16, centred, 1.0, torch.float32)


@CAPABILITIES
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated(activation, capability):
    for shape, dtype in zip(SHAPES, (torch.float32, torch.bfloat16, torch.float16), strict=True):
        run = Emulated(capability)
        hold(run, shape, dtype, activation)
        assert len(run.reports) >= 2


def test_traffic():
    """Each byte once: what is read and written, and no sector besides."""
    run = Emulated(counts=True)
    hold_forward(run, (64, 1024), torch.bfloat16, True)
    hold_backward(run, (64, 1024), torch.bfloat16, True)
    hold(run, (64, 1024), torch.bfloat16, "silu")
    for kernel in ("norm_kernel", "norm_backward_kernel", "gated_kernel", "gated_backward_kernel"):
        counts = run.report_of(kernel).counts
        assert sum(counts.sectors) <= 1.05 * sum(counts.fewest), kernel
