"""The losses of logits: the contract with gradients, odd rows, layouts, and what a row may depend on."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from llmkern.functional import cross_entropy as public
from llmkern.functional import distillation as public_distillation
from llmkern.loss import reference
from llmkern.verify import verify
from tests.loss.cases import (
    FLOATS,
    IGNORED,
    LAYOUTS,
    OPTIONS,
    ROWS,
    SHAPES,
    cross_entropy,
    distillation,
    logits,
    losses,
)

OPS = torch.ops.llmkern
EACH = pytest.mark.parametrize("dtype", FLOATS)
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@EACH
@EVERY_SHAPE
def test_cross_entropy(shape, dtype, isa):
    for options in OPTIONS.values():
        given = logits(shape, dtype)
        verify(losses(*options, OPS.cross_entropy), losses(*options), given).raise_if_failed()
        functions = cross_entropy(*options, OPS.cross_entropy), cross_entropy(*options)
        verify(*functions, given, gradients=False).raise_if_failed()


@EACH
@EVERY_SHAPE
@pytest.mark.parametrize("temperature", [0.5, 4.0, 20.0])
def test_distillation(temperature, shape, dtype, isa):
    student, targets = logits(shape, dtype)
    teacher = (student.float() + torch.randn(shape)).to(dtype)
    functions = distillation(temperature, OPS.distillation), distillation(temperature)
    verify(*functions, (student, teacher, targets)).raise_if_failed()


@pytest.mark.parametrize("name", ROWS)
def test_odd_rows(name, isa):
    """Where torch's loss is a number, ours is, and so with the gradients; a row changes nothing around it."""
    row, target = ROWS[name]
    x, targets = torch.randn(5, 8), torch.arange(5)
    expected = OPS.cross_entropy(x, targets, IGNORED, 0.0, 0.0)
    x[2], targets[2] = torch.tensor(row), target
    verify(
        cross_entropy(0.0, 1e-2, OPS.cross_entropy), cross_entropy(0.0, 1e-2), (x, targets), gradients=False
    ).raise_if_failed()
    results = []
    for function in (F.cross_entropy, public):
        leaf = x.clone().requires_grad_()
        loss = function(leaf, targets, reduction="none")
        results.append((loss, torch.autograd.grad(loss.sum(), leaf)[0]))
    for a, b in zip(*results, strict=True):
        if name == "ignored":  # torch multiplies its NaN by 0
            assert not b[2].any()
            a[2] = 0.0
        torch.testing.assert_close(b, a, equal_nan=True)
    keep = torch.tensor([0, 1, 3, 4])
    found = OPS.cross_entropy(x, targets, IGNORED, 0.0, 0.0)
    assert all(torch.equal(a[keep], b[keep]) for a, b in zip(found, expected, strict=True))


def test_classes_that_both_models_rule_out(isa):
    student, teacher = torch.randn(2, 3, 8)
    student[:, ::2] = teacher[:, ::2] = -torch.inf
    leaves = [t.requires_grad_() for t in (student, teacher)]
    loss = public_distillation(*leaves, torch.tensor([1, 3, 5]), temperature=2.0)
    some = [t[:, 1::2].detach().requires_grad_() for t in leaves]
    expected = public_distillation(*some, torch.tensor([0, 1, 2]), temperature=2.0)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, some), strict=True):
        assert not a[:, ::2].any()
        torch.testing.assert_close(a[:, 1::2], b)


@pytest.mark.parametrize("scale", [30.0, 300.0])
def test_sure_rows_keep_their_digits(scale, isa):
    """Of large logits: their log-sum-exp in float32 would leave the gradients no better than its own rounding."""
    x = (torch.randn(40, 50) * scale).requires_grad_()
    targets = x.argmax(-1)
    verify(losses(0.0, 0.0, OPS.cross_entropy), F_losses, (x, targets)).raise_if_failed()


def F_losses(x, targets):
    return F.cross_entropy(x, targets, reduction="none")


def test_the_reference_is_torchs():
    x, targets = logits((9, 37), torch.float64)
    teacher = x + torch.randn(9, 37, dtype=torch.float64)
    for smoothing in (0.0, 0.2):
        expected = F.cross_entropy(x, targets, reduction="none", label_smoothing=smoothing)
        torch.testing.assert_close(losses(smoothing)(x, targets), expected, rtol=1e-13, atol=1e-13)
    squares = losses(0.0, 0.25)(x, targets) - losses()(x, targets)
    counted = targets != IGNORED
    torch.testing.assert_close(squares, 0.25 * x.logsumexp(-1).square() * counted, rtol=1e-12, atol=1e-12)
    soft, hard = distillation(3.0)(x, teacher, targets)
    expected = F.kl_div(F.log_softmax(x / 3, 1), F.softmax(teacher / 3, 1), reduction="none").sum(1)
    torch.testing.assert_close(soft, expected, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(hard, F_losses(x, targets), rtol=1e-13, atol=1e-13)


def test_the_references_gradients_are_autograds():
    x, targets = logits((9, 37), torch.float64)
    teacher = (x + torch.randn(9, 37, dtype=torch.float64)).requires_grad_()
    x.requires_grad_()
    grads = torch.randn(2, 9, dtype=torch.float64)
    for options in OPTIONS.values():
        loss, lse = reference.cross_entropy(x, targets, IGNORED, *options)
        (expected,) = torch.autograd.grad(loss, x, grads[0])
        found = reference.cross_entropy_backward(grads[0], x, targets, lse, IGNORED, *options)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    soft, hard, statistics = reference.distillation(x, teacher, targets, 3.0, IGNORED)
    expected = torch.autograd.grad((soft, hard), (x, teacher), tuple(grads))
    given = x, teacher, targets, statistics, soft, 3.0, IGNORED, (True, True)
    for a, b in zip(reference.distillation_backward(*grads, *given), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@EACH
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strides(layout, dtype, isa):
    """Bit for bit, the gradients too."""
    x, targets = logits((6, 24), dtype)
    teacher = x.flip(0).contiguous()
    spread = torch.stack([targets, targets], -1).flatten()[::2]

    def results(x, teacher, targets, upstream):
        leaves = [t.detach().requires_grad_() for t in (x, teacher)]
        loss, lse = OPS.cross_entropy(leaves[0], targets, IGNORED, 0.1, 0.1)
        soft, hard, statistics = OPS.distillation(*leaves, targets, 2.0, IGNORED)
        grads = torch.autograd.grad((loss, soft, hard), leaves, (upstream,) * 3)
        return loss, lse, soft, hard, statistics, *grads

    upstream = torch.randn(6)
    expected = results(x, teacher, targets, upstream)
    got = results(layout(x), layout(teacher), spread, torch.stack([upstream, upstream], -1).flatten()[::2])
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert all(map(torch.isfinite, (t.sum() for t in expected)))


def test_a_row_depends_on_nothing_around_it(isa):
    x, targets = logits((150, 600), torch.float32)
    teacher = x.flip(0).contiguous()

    def results(x, teacher, targets):
        leaves = [t.detach().requires_grad_() for t in (x, teacher)]
        loss, _ = OPS.cross_entropy(leaves[0], targets, IGNORED, 0.1, 0.1)
        soft, hard, _ = OPS.distillation(*leaves, targets, 2.0, IGNORED)
        return loss, soft, hard, *torch.autograd.grad((loss.sum() + soft.sum() + hard.sum()), leaves)

    whole = results(x, teacher, targets)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        again = results(x, teacher, targets)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    part = results(x[70:75], teacher[70:75], targets[70:75])
    assert all(torch.equal(a, b[70:75]) for a, b in zip(part, whole, strict=True))
