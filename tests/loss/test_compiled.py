"""What the compiled kernels of the linear losses promise beside the contract: the same bits, and little memory."""

from __future__ import annotations

import pytest
import torch

from llmkern import backend, extension
from llmkern.loss import compiled_linear
from tests.loss.cases import FLOATS, IGNORED, classes, heads

pytestmark = pytest.mark.skipif(extension._C is None, reason=str(extension.MISSING))
NEEDS = [True] * 3
#: Rows of several chunks, entries of several blocks of the vocabulary, and a rest of each.
ROWS, COUNT = 150, 1000


def cross_entropy(given, targets, reduction="sum", needs=NEEDS):
    with backend.use("cpu"):
        return torch.ops.llmkern.linear_cross_entropy(*given, targets, IGNORED, 0.1, 1e-3, reduction, needs)


def distillation(given, targets):
    with backend.use("cpu"):
        return torch.ops.llmkern.linear_distillation(*given, targets, 2.0, 0.3, IGNORED, NEEDS)


def on_one_thread(function, *args):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return function(*args)
    finally:
        torch.set_num_threads(threads)


def same(got, expected) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", FLOATS)
def test_threads_change_nothing(dtype, isa):
    given, targets = heads(ROWS, (80, 37), COUNT, dtype), classes(ROWS, COUNT)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = cross_entropy(given[:3], targets), distillation(given, targets)
    finally:
        torch.set_num_threads(threads)
    assert same(on_one_thread(cross_entropy, given[:3], targets), found[0])
    assert same(on_one_thread(distillation, given, targets), found[1])


@pytest.mark.parametrize("width", [80, 37, 64])
def test_a_row_depends_on_nothing_around_it(width, isa):
    given, targets = heads(ROWS, (width,), COUNT, torch.float32), classes(ROWS, COUNT)
    whole = cross_entropy(given, targets)
    for rows in (slice(70, 75), slice(149, 150), slice(0, 17)):
        part = cross_entropy([given[0][rows], *given[1:]], targets[rows])
        # The reduced loss, then what each row has of its own: its log-sum-exp and its gradient.
        assert torch.equal(part[1], whole[1][rows]) and torch.equal(part[2], whole[2][rows])


def test_gradients_made_again_have_the_same_bits(isa):
    given, targets = heads(ROWS, (80,), COUNT, torch.float32), classes(ROWS, COUNT)
    _, lse, *made = cross_entropy(given, targets)
    with backend.use("cpu"):
        again = torch.ops.llmkern.linear_cross_entropy_backward(
            torch.ones(ROWS), *given, targets, lse, IGNORED, 0.1, 1e-3, NEEDS
        )
    assert same(again, made)


def test_gradients_that_are_not_needed_change_no_other(isa):
    given, targets = heads(ROWS, (80,), COUNT, torch.float32), classes(ROWS, COUNT)
    whole = cross_entropy(given, targets)
    for i in range(3):
        alone = cross_entropy(given, targets, needs=[i == j for j in range(3)])
        assert same(alone[:2], whole[:2]) and torch.equal(alone[2 + i], whole[2 + i])
        assert all(alone[2 + j].numel() == 0 for j in range(3) if j != i)


def test_the_memory_that_it_works_in():
    width, count, float32 = 576, 49152, extension.DTYPE_CODES[torch.float32]
    sizes = {
        "cross-entropy": extension._C.linear_cross_entropy_units(width, count, NEEDS, False, float32),
        "made again": extension._C.linear_cross_entropy_units(width, count, NEEDS, True, float32),
        "distillation": extension._C.linear_distillation_units(
            width, width, count, compiled_linear.DISTILLATION_ROWS, True, True, True
        ),
    }
    assert all(4 * units <= 16e6 for units in sizes.values()), sizes
    assert 4 * sizes["made again"] < 4.5e6
