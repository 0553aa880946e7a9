"""The Triton kernels of this family in Triton's interpreter; test_triton.py runs this file, in a process for it."""

from __future__ import annotations

import pytest
import torch

from llmkern.loss import reference, triton_launch, triton_linear
from tests.emulation.triton_interpreter import interpret, round_as_hardware
from tests.loss.cases import FLOATS, IGNORED, LAYOUTS, NAN_ROWS, OPTIONS, ROWS, SHAPES, classes, heads, logits
from tests.loss.far import far
from tests.loss.on_triton import (
    hold_cross_entropy,
    hold_distillation,
    hold_far,
    hold_far_linear,
    hold_linear,
    hold_linear_distillation,
    pair,
)

round_as_hardware()
EACH = pytest.mark.parametrize("dtype", FLOATS)


@EACH
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_cross_entropy(shape, dtype):
    for options in OPTIONS.values() if dtype == torch.float32 else [OPTIONS["both"]]:
        hold_cross_entropy(interpret, *logits(shape, dtype), *options)


@EACH
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_distillation(shape, dtype):
    for temperature in (0.5, 3.0, 20.0) if dtype == torch.float32 else (4.0,):
        hold_distillation(interpret, *pair(shape, dtype), temperature)


@EACH
def test_far_from_0(dtype):
    hold_far(interpret, *far(dtype))
    hold_far(interpret, *far(dtype, True))
    hold_far_linear(interpret, *far(dtype))


@pytest.mark.parametrize("name", ROWS)
def test_odd_rows(name):
    """Each alone, and what it does to its neighbours: nothing."""
    row, target = ROWS[name]
    x, targets = torch.randn(5, 8), torch.arange(5)
    expected = triton_launch.cross_entropy(interpret, x, targets, IGNORED, 0.0, 0.0)
    x[2], targets[2] = torch.tensor(row), target
    for options in ((0.0, 0.0), (0.0, 1e-2), (0.1, 0.0)):
        hold_cross_entropy(interpret, x[2:3], targets[2:3], *options)
    found = triton_launch.cross_entropy(interpret, x, targets, IGNORED, 0.0, 0.0)
    keep = torch.tensor([0, 1, 3, 4])
    assert all(torch.equal(a[keep], b[keep]) for a, b in zip(found, expected, strict=True))
    taught = torch.randn(5, 8)
    if name not in (*NAN_ROWS, "ignored"):
        for teacher in (taught, x.clone()):
            hold_distillation(interpret, x, teacher, targets, 2.0)
    hold_distillation(interpret, taught[2:3], x[2:3], targets[2:3] * 0, 2.0)


def test_masked_blocks():
    """-inf up to, from, and in a block by itself."""
    x, targets = torch.randn(4, 9000), torch.tensor([8999, 3, 5000, 2])
    x[0, :5000], x[1, 4096:], x[2, :4096], x[2, 8192:] = (-torch.inf,) * 4
    hold_cross_entropy(interpret, x, targets)
    student = torch.where(x.isinf(), x, torch.randn(4, 9000))
    hold_distillation(interpret, student, x, targets, 2.0)


def test_a_class_that_is_not_there():
    x, targets = torch.randn(4, 8), torch.tensor([1, 8, -1, 2**40 + 3])
    loss, lse = triton_launch.cross_entropy(interpret, x, targets, IGNORED, 0.0, 0.0)
    grad = triton_launch.cross_entropy_backward(interpret, torch.ones(4), x, targets, lse, IGNORED, 0.0, 0.0)
    _, hard, _ = triton_launch.distillation(interpret, x, x, targets, 1.0, IGNORED)
    for found in (loss, hard, grad.sum(1)):
        assert found[0].isfinite() and found[1:].isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strides(layout):
    student, teacher, targets = pair((6, 24), torch.bfloat16)
    given, wide = torch.randn(6), torch.stack([targets, targets], -1).flatten()[::2]

    def results(student, teacher, targets, given):
        loss, lse = triton_launch.cross_entropy(interpret, student, targets, IGNORED, 0.1, 0.1)
        grad = triton_launch.cross_entropy_backward(interpret, given, student, targets, lse, IGNORED, 0.1, 0.1)
        both = triton_launch.distillation(interpret, student, teacher, targets, 2.0, IGNORED)
        options = targets, both[2], both[0], 2.0, IGNORED, (True, True)
        return loss, lse, grad, *both, *triton_launch.distillation_backward(
            interpret, given, given, student, teacher, *options
        )  # fmt: skip

    plain = results(student, teacher, targets, given)
    spread = torch.stack([given, given], -1).flatten()[::2]
    for a, b in zip(plain, results(layout(student), layout(teacher), wide, spread), strict=True):
        assert torch.equal(a, b)


@EACH
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear(dtype, reduction):
    hold_linear(interpret, 300, 37, dtype, reduction)  # three chunks of 128, the last of them not full
    hold_linear(interpret, 5, 1030, dtype, reduction, biased=False)


@EACH
def test_linear_distillation(dtype):
    hold_linear_distillation(interpret, 300, 37, dtype)
    hold_linear_distillation(interpret, 5, 1030, dtype, (True, False, False))
    hold_linear_distillation(interpret, 5, 7, dtype, (False, False, False))


def test_linear_without_rows_that_count():
    hidden, weight, bias = heads(4, (8,), 6, torch.float32)
    given = hidden, weight, bias, torch.full((4,), IGNORED), IGNORED, 0.1, 0.1, "mean", (True, True, True)
    loss, _, *gradients = triton_linear.linear_cross_entropy(interpret, *given)
    assert not loss.any() and not any(g.any() for g in gradients)
    given = hidden[:0], weight, bias, classes(0, 6), *given[4:]
    found = triton_linear.linear_cross_entropy(interpret, *given)
    for a, b in zip(found, reference.linear_cross_entropy(*given), strict=True):
        assert torch.equal(a, b)


def test_the_rows_of_a_chunk():
    """By memory, and a share of all rows; at least and in steps of a product's tile."""
    assert triton_linear.chunk_rows(100000, 128256, 2) == 1024  # 250 MiB of logits
    assert triton_linear.chunk_rows(100000, 128256, 4) == 512
    assert triton_linear.chunk_rows(100000, 1000, 2) == 2048
    assert triton_linear.chunk_rows(4096, 128256, 2) == 256 and triton_linear.chunk_rows(1, 5, 2) == 128
    assert triton_linear.chunk_rows(10**6, 10**7, 4) == 128
