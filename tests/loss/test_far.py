"""Gradients of logits far from 0 are right wherever those of torch's log_softmax are."""

from __future__ import annotations

import pytest
import torch

from llmkern import backend
from llmkern.functional import cross_entropy, distillation, linear_cross_entropy, linear_distillation
from tests.loss.cases import FLOATS, IGNORED
from tests.loss.far import close, cross_entropy_gradient, distillation_gradients, far, wider

BOTH = pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
EACH = pytest.mark.parametrize("dtype", FLOATS)
OPTIONS = pytest.mark.parametrize("options", [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-3)], ids=["", "smoothed", "z-loss"])


def test_the_lowest_float(isa):
    """The plainest case, in numbers."""
    x = torch.full((1, 4), torch.finfo(torch.float32).min, requires_grad=True)
    cross_entropy(x, torch.tensor([1])).backward()
    torch.testing.assert_close(x.grad, torch.tensor([[0.25, -0.75, 0.25, 0.25]]))


def hold_cross_entropy(dtype, masked, options):
    x, targets = far(dtype, masked)
    leaf = x.clone().requires_grad_()
    smoothing, z_loss = options
    loss = cross_entropy(leaf, targets, label_smoothing=smoothing, z_loss=z_loss, reduction="none")
    (found,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss))
    close(found, cross_entropy_gradient(x, targets, *options))


@EACH
@BOTH
@OPTIONS
def test_cross_entropy(options, masked, dtype, isa):
    hold_cross_entropy(dtype, masked, options)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@BOTH
@OPTIONS
def test_cross_entropy_in_plain_pytorch(options, masked, dtype):
    with backend.use("reference"):
        hold_cross_entropy(dtype, masked, options)


def hold_distillation(dtype, temperature):
    x, targets = far(dtype)
    usual = torch.randn(x.shape).to(dtype)
    for student, teacher in ((x, usual), (usual, x), (x, x.clone())):
        leaves = [t.clone().requires_grad_() for t in (student, teacher)]
        soft, hard, _ = torch.ops.llmkern.distillation(*leaves, targets, temperature, IGNORED)
        found = torch.autograd.grad((soft, hard), leaves, (torch.ones_like(soft),) * 2)
        expected = distillation_gradients(student, teacher, targets, temperature)
        close(found[0], expected[0])
        small = soft < 100.0  # what the divergence has no digits left for is not the teacher's gradient's to know
        close(found[1][small], expected[1][small])
        assert int(small.sum()) > len(x) // 3
    masked, _ = far(dtype, True)
    leaf = masked.clone().requires_grad_()
    (found,) = torch.autograd.grad(distillation(leaf, usual, targets, temperature=temperature, alpha=1.0), leaf)
    p, q = ((t.to(wider(dtype)) / temperature).softmax(-1) for t in (masked, usual))
    close(found, temperature * (p - q) / len(p))


@EACH
@pytest.mark.parametrize("temperature", [3.0, 4.0])
def test_distillation(temperature, dtype, isa):
    hold_distillation(dtype, temperature)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_distillation_in_plain_pytorch(dtype):
    with backend.use("reference"):
        hold_distillation(dtype, 4.0)


def head(x):
    """hidden and weight whose logits are x exactly; the gradient of the weight is then that of x."""
    return torch.eye(len(x), dtype=x.dtype), x.t().contiguous().requires_grad_()


@EACH
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_cross_entropy(reduction, dtype, isa):
    x, targets = far(dtype)
    hidden, weight = head(x)
    loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction)
    (found,) = torch.autograd.grad(loss, weight, torch.ones_like(loss))
    expected = cross_entropy_gradient(x, targets)
    close(found.t(), expected / (targets != IGNORED).sum() if reduction == "mean" else expected)


@EACH
def test_linear_distillation(dtype, isa):
    x, targets = far(dtype)
    usual = torch.randn(x.shape).to(dtype)
    for student, teacher in ((x, usual), (usual, x)):
        hidden, weight = head(student)
        loss = linear_distillation(hidden, weight, hidden, head(teacher)[1], targets, alpha=1.0)
        (found,) = torch.autograd.grad(loss, weight)
        p, q = ((t.float() / 4.0).softmax(-1) for t in (student, teacher))
        close(found.t(), 4.0 * (p - q) / len(p))
