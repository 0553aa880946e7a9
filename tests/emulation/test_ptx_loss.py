"""The PTX of the Triton kernels of the losses, against the references."""

from __future__ import annotations

import pytest
import torch

from tests.emulation.triton_on_ptx import Emulated
from tests.loss.cases import NAN_ROWS, OPTIONS, ROWS, logits
from tests.loss.far import far
from tests.loss.on_triton import (
    hold_cross_entropy,
    hold_distillation,
    hold_far,
    hold_linear,
    hold_linear_distillation,
    pair,
)

pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux)")
CAPABILITIES = pytest.mark.parametrize("capability", [80, 90])
#: Two blocks of rows, and several blocks of columns.
SHAPES = {torch.float32: (9, 64), torch.bfloat16: (1, 4100), torch.float16: (7, 37)}
EACH = pytest.mark.parametrize("dtype", SHAPES)


@CAPABILITIES
@EACH
def test_cross_entropy(dtype, capability):
    run = Emulated(capability, {80: "reverse", 90: "random"}[capability])
    hold_cross_entropy(run, *logits(SHAPES[dtype], dtype), *OPTIONS["both"])
    assert len(run.reports) >= 2


@CAPABILITIES
@EACH
def test_distillation(dtype, capability):
    run = Emulated(capability, {80: "reverse", 90: "random"}[capability])
    hold_distillation(run, *pair(SHAPES[dtype], dtype), 2.0, ((True, True),))
    assert len(run.reports) >= 2


def test_odd_rows():
    """In one tile. NaN of several origins in one sum has other bits in each lane, which the emulator takes for a race,
    where a GPU has one NaN."""
    names = [name for name in ROWS if name not in NAN_ROWS]
    rows, targets = zip(*(ROWS[name] for name in names), strict=True)
    x, targets = torch.tensor(rows), torch.tensor(targets)
    hold_cross_entropy(Emulated(), x, targets, 0.0, 1e-2)
    x[-1] = 0.0  # the one that does not count, which distillation reads
    hold_distillation(Emulated(), torch.randn(x.shape), x, targets, 2.0, ((True, True),))
    hold_cross_entropy(Emulated(), torch.tensor([ROWS[name][0] for name in NAN_ROWS]), torch.zeros(4).long())


def test_far_from_0():
    hold_far(Emulated(), *far(torch.float32))


def test_linear():
    run = Emulated()
    hold_linear(run, 3, 40, torch.float16, "mean")
    hold_linear(run, 3, 40, torch.float32, "none", biased=False)
    hold_linear_distillation(run, 3, 40, torch.bfloat16)
    assert {kernel for _, kernel in run.launched} == {
        "cross_entropy_kernel", "cross_entropy_backward_kernel", "distillation_kernel",
    }  # fmt: skip


def test_traffic():
    """Each byte once: the logits and what is written, and no sector besides, but for the gradients in place, which
    read the logits twice."""
    run = Emulated(counts=True)
    hold_cross_entropy(run, *logits((4, 4096), torch.bfloat16))
    hold_distillation(run, *pair((4, 4096), torch.bfloat16), 4.0, ((True, True),))
    for kernel in (
        "cross_entropy_kernel", "cross_entropy_backward_kernel", "distillation_kernel", "distillation_backward_kernel",
    ):  # fmt: skip
        counts = run.report_of(kernel).counts
        assert sum(counts.sectors) <= 1.05 * sum(counts.fewest), kernel
