"""The losses of hidden states: the contract, the gradients that the forward makes, autocast and memory."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import llmkern
from llmkern.functional import linear_cross_entropy, linear_distillation
from llmkern.loss import LinearDistillationLoss, reference
from llmkern.verify import verify
from tests.loss.cases import FLOATS, IGNORED, NEEDS, OPTIONS, classes, heads

OPS = torch.ops.llmkern
EACH = pytest.mark.parametrize("dtype", FLOATS)
SHAPES = {
    "one of everything": (1, 1, 1),
    "usual": (33, 64, 96),
    "primes": (7, 13, 37),
    "several chunks": (300, 8, 130),
    "logits in memory of the gradient, and some made again": (140, 96, 700),
}
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@EACH
@EVERY_SHAPE
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy(reduction, shape, dtype, isa):
    rows, width, count = shape
    hidden, weight, bias = heads(rows, (width,), count, dtype)
    # Of one class, what smoothing adds and takes away is 0 but for rounding, which torch's order of operations hides.
    for options in (OPTIONS["plain"], OPTIONS["both" if count > 1 else "z-loss"]):
        loss = llmkern.LinearCrossEntropyLoss(IGNORED, reduction, *options)
        targets = torch.randint(count, (rows,))
        verify(loss, inputs=(hidden, weight, targets, bias)).raise_if_failed()
        targets[1::3] = IGNORED
        verify(loss, inputs=(hidden, weight, targets)).raise_if_failed()


@EACH
@EVERY_SHAPE
def test_distillation(shape, dtype, isa):
    rows, width, count = shape
    given = heads(rows, (width, 2 * width), count, dtype)
    targets = torch.randint(count, (rows,))
    student = [t.requires_grad_() for t in given[:3]]
    verify(
        LinearDistillationLoss(2.0, 0.4), inputs=(*student[:2], *given[3:5], targets, student[2], given[5])
    ).raise_if_failed()
    verify(LinearDistillationLoss(), inputs=(*student[:2], *given[3:5], targets)).raise_if_failed()


def leaves(rows: int = 20, count: int = 30, dtype=torch.float32):
    return [t.requires_grad_() for t in heads(rows, (8,), count, dtype)], classes(rows, count)


def both(function):
    """The loss of one of the two functions of (hidden, weight, bias, targets), and its plain version."""
    taught, head = torch.randn(20, 5), torch.randn(30, 5)
    if function is linear_cross_entropy:
        return (
            lambda h, w, b, t: linear_cross_entropy(h, w, t, b, label_smoothing=0.1, z_loss=0.01),
            lambda h, w, b, t: _mean(reference.cross_entropy(F.linear(h, w, b), t, IGNORED, 0.1, 0.01)[0], t),
        )
    return (
        lambda h, w, b, t: linear_distillation(h, w, taught, head, t, b, temperature=2.0),
        lambda h, w, b, t: reference.linear_distillation_loss(h, w, b, taught, head, None, t, 2.0, 0.3, IGNORED)[0],
    )


def _mean(loss, targets):
    return loss.sum() / (targets != IGNORED).sum()


FUNCTIONS = pytest.mark.parametrize("function", [linear_cross_entropy, linear_distillation])


@FUNCTIONS
def test_backward_more_than_once(function, isa):
    """Whatever the upstream gradients are: the first takes the kept gradients, the second makes them again."""
    given, targets = leaves()
    fast, plain = both(function)
    expected = torch.autograd.grad(plain(*given, targets), given)
    for factors in ((1.0, 1.0, 1.0), (-3.0, 1.0, 0.5)):
        loss = fast(*given, targets)
        kept = loss.grad_fn.kept
        for factor in factors:
            for a, b in zip(torch.autograd.grad(loss * factor, given, retain_graph=True), expected, strict=True):
                torch.testing.assert_close(a, factor * b)
        assert len(kept) == 3


@FUNCTIONS
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("factor", [1.0, 0.37])
def test_every_backward_has_the_same_bits(factor, dtype, function, isa):
    given, targets = leaves(dtype=dtype)
    taught, head = torch.randn(20, 5).to(dtype), torch.randn(30, 5).to(dtype)
    if function is linear_cross_entropy:
        loss = linear_cross_entropy(given[0], given[1], targets, given[2], label_smoothing=0.1)
    else:
        loss = linear_distillation(given[0], given[1], taught, head, targets, given[2])
    upstream = torch.tensor(factor, dtype=loss.dtype)
    first, *others = (torch.autograd.grad(loss, given, upstream, retain_graph=True) for _ in range(3))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(reduction):
    """Which wants a backward to give the same bits twice."""
    given, targets = leaves(5, 6, torch.float64)

    def function(hidden, weight, bias):
        return linear_cross_entropy(
            hidden, weight, targets, bias, label_smoothing=0.1, z_loss=0.01, reduction=reduction
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, given) and torch.autograd.gradgradcheck(function, given)


@FUNCTIONS
def test_several_upstream_gradients_at_once(function, isa):
    """A Jacobian's rows; what is kept is still there for a backward after it, and made again for one after that."""
    given, targets = leaves()
    fast, plain = (f(*given, targets) for f in both(function))
    upstream = torch.tensor([1.0, -2.0, 0.5])
    each = [torch.autograd.grad(f, given, upstream, is_grads_batched=True, retain_graph=True) for f in (fast, plain)]
    after = [torch.autograd.grad(f, given, retain_graph=True) for f in (fast, plain)]
    last = [torch.autograd.grad(f, given, upstream, is_grads_batched=True) for f in (fast, plain)]
    for results in (each, after, last):
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


@FUNCTIONS
def test_accumulation(function, isa):
    """.grad takes what was kept as its own, and a second backward adds to it without changing what it adds."""
    given, targets = leaves()
    fast, plain = both(function)
    expected = torch.autograd.grad(plain(*given, targets), given)
    loss = fast(*given, targets)
    address = loss.grad_fn.kept[1].data_ptr()
    loss.backward(retain_graph=True)
    assert given[1].grad.data_ptr() == address
    loss.backward()
    for leaf, grad in zip(given, expected, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * grad)


@FUNCTIONS
def test_second_derivatives(function, isa):
    given, targets = leaves()
    fast, plain = both(function)

    def second(function):
        grads = torch.autograd.grad(function(*given, targets).square(), given, create_graph=True)
        return *grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), given)

    for a, b in zip(second(fast), second(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@FUNCTIONS
def test_only_what_is_needed(function, isa):
    """None is made that nobody asked for."""
    fast, plain = both(function)
    for needs in NEEDS:
        given, targets = leaves()
        given = [t.detach().requires_grad_(n) for t, n in zip(given, needs, strict=True)]
        loss = fast(*given, targets)
        assert loss.requires_grad == any(needs)
        wanted = [t for t in given if t.requires_grad]
        if wanted:
            assert [k.numel() > 0 for k in loss.grad_fn.kept] == list(needs)
            for a, b in zip(*(torch.autograd.grad(f(*given, targets), wanted) for f in (fast, plain)), strict=True):
                torch.testing.assert_close(a, b)
    with torch.no_grad():
        assert not fast(*given, targets).requires_grad


@FUNCTIONS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(function, dtype, isa):
    """The product is made in autocast's dtype, the loss in float32; so with torch's own."""
    given, targets = leaves()
    fast, plain = both(function)
    with torch.autocast("cpu", dtype):
        loss, expected = fast(*given, targets), plain(*given, targets).float()
    assert loss.dtype == torch.float32 and loss.grad_fn.kept[0].dtype == reference.gradient_dtype(dtype)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    for a, b in zip(torch.autograd.grad(loss, given), torch.autograd.grad(expected, given), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05 * float(b.abs().max()))


def test_small_gradients_survive_float16(isa):
    """Those of a mean over many rows lie below the smallest float16 until a scaled upstream gradient comes."""
    (hidden, weight, _), targets = leaves(4096, 40, torch.float16)
    scale = 2.0**14
    loss = linear_cross_entropy(hidden, weight, targets)
    found = torch.autograd.grad(loss, (hidden, weight), torch.tensor(scale))
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected = torch.autograd.grad(F.cross_entropy(wide[0] @ wide[1].T, targets) * scale, wide)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float16
        assert float((a.double() - b).abs().max()) < 2e-3 * float(b.abs().max())


@FUNCTIONS
def test_no_rows_that_count(function, isa):
    """The mean is NaN, the gradients of the cross-entropy are 0, as torch's."""
    given, targets = leaves()
    loss = both(function)[0](*given, torch.full_like(targets, IGNORED))
    assert loss.isnan()
    grads = torch.autograd.grad(loss, given)
    assert all(g.isfinite().all() for g in grads)
    assert function is linear_distillation or not any(g.any() for g in grads)


def test_the_teacher_gets_no_gradient(isa):
    given = [t.requires_grad_() for t in heads(5, (4, 6), 7, torch.float32)]
    loss = linear_distillation(given[0], given[1], given[3], given[4], classes(5, 7), given[2], given[5])
    found = torch.autograd.grad(loss, given, allow_unused=True)
    assert all(g is not None for g in found[:3]) and all(g is None for g in found[3:])


def test_leading_shapes(isa):
    (hidden, weight, bias), targets = leaves()
    flat = linear_cross_entropy(hidden, weight, targets, bias, reduction="none")
    shaped = linear_cross_entropy(hidden.view(4, 5, 8), weight, targets.view(4, 5), bias, reduction="none")
    assert shaped.shape == (4, 5) and torch.equal(shaped.flatten(), flat)
    one = linear_cross_entropy(hidden[3], weight, targets[3], bias)
    torch.testing.assert_close(one, flat[3])
