"""The operators as torch sees them, bad input, and the modules."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.nn import functional as F

import llmkern
from llmkern import functional, loss
from llmkern.verify import verify
from tests.loss.bad_inputs import ARGUMENTS, EVERY
from tests.loss.cases import FLOATS, IGNORED, classes, heads, logits

OPS = torch.ops.llmkern


def given(*shape: int, grad: bool = True):
    return [t.requires_grad_(grad) for t in torch.randn(2, *shape)]


def test_opcheck():
    (student, teacher), targets = given(5, 12), classes(5, 12)
    grad = torch.randn(5, requires_grad=True)
    opcheck(OPS.cross_entropy, (student, targets, IGNORED, 0.1, 0.1))
    _, lse = OPS.cross_entropy(student.detach(), targets, IGNORED, 0.1, 0.1)
    opcheck(OPS.cross_entropy_backward, (grad, student, targets, lse, IGNORED, 0.1, 0.1))
    opcheck(OPS.distillation, (student, teacher, targets, 2.0, IGNORED))
    soft, _, statistics = OPS.distillation(student.detach(), teacher.detach(), targets, 2.0, IGNORED)
    rest = student, teacher, targets, statistics, soft, 2.0, IGNORED
    opcheck(OPS.distillation_backward, (grad, grad.detach(), *rest, [True, True]))
    opcheck(
        OPS.distillation_backward,
        (grad.detach(), grad.detach(), *(t.detach() for t in rest[:5]), *rest[5:], [True, False]),
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("needs", [[True] * 3, [True, False, False], [False] * 3])
def test_opcheck_linear(needs, reduction):
    leaves = [t.requires_grad_(n) for t, n in zip(heads(5, (6,), 9, torch.float32), needs, strict=True)]
    targets = classes(5, 9)
    opcheck(OPS.linear_cross_entropy, (*leaves, targets, IGNORED, 0.1, 0.1, reduction, needs))
    if reduction == "none":
        lse = OPS.linear_cross_entropy(*leaves, targets, IGNORED, 0.1, 0.1, reduction, needs)[1].detach()
        grad = torch.randn(5)
        opcheck(OPS.linear_cross_entropy_backward, (grad, *leaves, targets, lse, IGNORED, 0.1, 0.1, needs))
    if reduction == "mean":
        taught = heads(5, (4,), 9, torch.float32)
        opcheck(OPS.linear_distillation, (*leaves, *taught, targets, 2.0, 0.3, IGNORED, needs))


def every(x, hidden, weight, bias, teacher, targets):
    """All four functions."""
    total = functional.cross_entropy(x * 2, targets, label_smoothing=0.1, z_loss=0.01)
    total = total + functional.cross_entropy(x, targets, reduction="none").square().sum()
    total = total + functional.linear_cross_entropy(hidden * 2, weight, targets, bias, reduction="sum")
    total = total + functional.linear_cross_entropy(hidden, weight, targets, reduction="none").square().sum()
    total = total + functional.distillation(x, teacher, targets, temperature=2.0)
    taught = hidden.detach() * 2
    return total + functional.linear_distillation(hidden, weight, taught, weight.detach(), targets, bias)


def arguments():
    (x, teacher), (hidden, weight, bias) = given(5, 9), heads(5, (6,), 9, torch.float32)
    return [x, *(t.requires_grad_() for t in (hidden, weight, bias)), teacher], classes(5, 9)


def test_compile_fullgraph():
    leaves, targets = arguments()
    compiled = torch.compile(every, fullgraph=True, backend="aot_eager")
    results = [(f(*leaves, targets), *torch.autograd.grad(f(*leaves, targets), leaves)) for f in (every, compiled)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*leaves, targets), every(*leaves, targets))


def test_export():
    class Losses(torch.nn.Module):
        def forward(self, *args):
            return every(*args)

    leaves, targets = arguments()
    leaves = [t.detach() for t in leaves]
    rows = torch.export.Dim("rows", min=2)
    shapes = [{0: rows}, {0: rows}, {}, {}, {0: rows}, {0: rows}]
    exported = torch.export.export(Losses(), (*leaves, targets), dynamic_shapes={"args": tuple(shapes)}).module()
    few = [t[:3] if s else t for t, s in zip((*leaves, targets), shapes, strict=True)]
    for each in ((*leaves, targets), few):
        torch.testing.assert_close(exported(*each), every(*each))


def test_second_derivatives():
    """Of the losses of logits; those of hidden states are in test_linear.py."""
    targets = classes(5, 9)

    def second(first, other, leaves):
        total = first(leaves[0]).sin().sum() + other(*leaves)
        grads = torch.autograd.grad(total, leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    leaves = given(5, 9)
    found = second(
        lambda x: functional.cross_entropy(x, targets, label_smoothing=0.1, z_loss=0.1, reduction="none"),
        lambda x, y: functional.distillation(x, y, targets, temperature=2.0),
        leaves,
    )
    wide = [t.detach().double().requires_grad_() for t in leaves]
    expected = second(
        lambda x: (
            F.cross_entropy(x, targets, label_smoothing=0.1, reduction="none")
            + 0.1 * (x.logsumexp(-1).square() * (targets != IGNORED))
        ),
        lambda x, y: llmkern.reference.DistillationLoss(2.0)(x, y, targets),
        wide,
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["eager", "fake"])
@pytest.mark.parametrize(
    ("function", "changed", "error", "words"),
    [(function, *rest) for function, _, *rest in EVERY],
    ids=[f"{function}: {name}" for function, name, *_ in EVERY],
)
def test_bad_input(function, changed, error, words, mode):
    given = {**ARGUMENTS[function], **changed}
    if mode == "fake":
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        given = {k: fake.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    with pytest.raises(error) as raised:
        getattr(functional, function)(**given)
    assert all(word in str(raised.value) for word in words), str(raised.value)


@pytest.mark.parametrize("function", ARGUMENTS)
@pytest.mark.parametrize("wrong", [8, -1, 2**40])
def test_a_class_that_is_not_there(function, wrong):
    """As torch says it, under the same words, on every way to a kernel."""
    call = getattr(functional, function)
    targets = torch.tensor([1, wrong, IGNORED])
    with pytest.raises(IndexError, match=f"targets: .*Target {wrong} is out of bounds"):
        call(**{**ARGUMENTS[function], "targets": targets})
    with pytest.raises(IndexError, match="out of bounds"):
        torch.compile(call, backend="eager")(**{**ARGUMENTS[function], "targets": targets})
    targets[2] = 1
    assert call(**{**ARGUMENTS[function], "targets": targets}, ignore_index=wrong).isfinite()
    with pytest.raises(IndexError, match="out of bounds"):
        F.cross_entropy(torch.zeros(3, 8), targets)


def test_leading_shapes():
    x, targets = logits((12, 7), torch.float32)
    flat = functional.cross_entropy(x, targets, reduction="none")
    shaped = functional.cross_entropy(x.view(3, 4, 7), targets.view(3, 4), reduction="none")
    assert shaped.shape == (3, 4) and torch.equal(shaped.flatten(), flat)
    one = functional.cross_entropy(x[4], targets[4], reduction="none")
    assert one.shape == () and torch.equal(one, flat[4])
    assert functional.cross_entropy(x[:0], targets[:0]).isnan()
    assert functional.cross_entropy(x[:0], targets[:0], reduction="sum") == 0.0


MODULES = {
    "plain": {},
    "sum": {"reduction": "sum", "label_smoothing": 0.1},
    "none": {"reduction": "none", "ignore_index": 3},
    "z-loss": {"z_loss": 0.1, "label_smoothing": 0.2},
    "class weights": {"weight": torch.rand(12)},
}


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES)
def test_cross_entropy_loss(options, dtype, isa):
    module, plain = llmkern.CrossEntropyLoss(**options), llmkern.reference.CrossEntropyLoss(**options)
    module, plain = module.to(dtype), plain.to(dtype)
    x, targets = logits((20, 12), dtype)
    assert list(module.state_dict()) == list(plain.state_dict()) and "CrossEntropyLoss" in repr(module)
    given = x, torch.where(targets == IGNORED, 3, targets)
    if dtype == torch.float64:  # torch's own, but for the z-loss
        torch.testing.assert_close(module(*given), plain(*given), rtol=1e-14, atol=1e-14)
    else:
        verify(module, plain, given).raise_if_failed()
    one = targets[0]
    assert module(x[0], one).dtype == dtype
    torch.testing.assert_close(module(x[0], one), plain(x[0], one))


def test_what_is_torchs_own_to_serve():
    x, targets = torch.randn(4, 5, 3), torch.randint(5, (4, 3))
    module, plain = llmkern.CrossEntropyLoss(), torch.nn.CrossEntropyLoss()
    assert torch.equal(module(x, targets), plain(x, targets))
    chances = torch.rand(4, 5).softmax(-1)
    assert torch.equal(module(x[..., 0], chances), plain(x[..., 0], chances))
    with pytest.raises(ValueError, match=r"z_loss: expected floating logits of \(N, C\) .* got \(4, 5, 3\) float32"):
        llmkern.CrossEntropyLoss(z_loss=0.1)(x, targets)
    for bad in (torch.tensor([9, 1, 1, 1]), targets[:, 0].int(), targets[:3, 0]):
        with pytest.raises((RuntimeError, ValueError, IndexError)) as expected:
            plain(x[..., 0], bad)
        with pytest.raises(type(expected.value)):
            module(x[..., 0], bad)


@pytest.mark.parametrize("dtype", FLOATS)
def test_distillation_loss(dtype, isa):
    (student, targets), teacher = logits((20, 12), dtype), logits((20, 12), dtype)[0]
    for options in ((), (1.0, 0.5), (2.5, 0.0), (0.5, 1.0)):
        verify(loss.DistillationLoss(*options), inputs=(student, teacher, targets)).raise_if_failed()
    module = loss.DistillationLoss()
    assert (module.temperature, module.alpha) == (4.0, 0.3) and not module.state_dict()
    assert repr(pickle.loads(pickle.dumps(module))) == "DistillationLoss(temperature=4.0, alpha=0.3)"


def test_distillation_of_sequences():
    student, teacher = torch.randn(2, 3, 4, 12)
    targets = torch.randint(12, (3, 4))
    module = loss.DistillationLoss()
    flat = module(student.flatten(0, 1), teacher.flatten(0, 1), targets.flatten())
    assert torch.equal(module(student, teacher, targets), flat)
    with pytest.raises(ValueError, match=r"targets: .*got \(3, 11\)"):
        module(student, teacher, torch.randint(4, (3, 11)))
    with pytest.raises(ValueError, match=r"student_logits: .*told from the second, got shape \(3, 12, 12\)"):
        module(torch.randn(3, 12, 12), torch.randn(3, 12, 12), torch.randint(12, (3, 12)))


def channels():
    return torch.randint(12, (20, 3))


#: What the plain version takes: the shapes of student and teacher, their dtypes, and labels, which are made in the
#: test, after its seed is set: bounds of 16 bits hold for most numbers, not for all.
TAKEN = {
    "a teacher of 16 bits": ((20, 12), (20, 12), torch.float32, torch.bfloat16, lambda: classes(20, 12)),
    "a student of 16 bits": ((20, 12), (20, 12), torch.bfloat16, torch.float32, lambda: classes(20, 12)),
    "torch's layout": ((20, 12, 3), (20, 12, 3), torch.float32, torch.float32, channels),
    "torch's layout, a teacher of 16 bits": ((20, 12, 3), (20, 12, 3), torch.float32, torch.bfloat16, channels),
    "probabilities": ((20, 12), (20, 12), torch.float32, torch.float32, lambda: torch.rand(20, 12).softmax(-1)),
    "a teacher of one row": ((20, 12), (1, 12), torch.float32, torch.float32, lambda: classes(20, 12)),
    "a student of one row": ((1, 12), (20, 12), torch.float32, torch.float32, lambda: torch.tensor([3])),
    "uint8": ((20, 12), (20, 12), torch.float32, torch.float32, lambda: torch.randint(12, (20,), dtype=torch.uint8)),
}


@pytest.mark.parametrize("under_autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("name", TAKEN)
def test_distillation_takes_what_the_reference_takes(name, under_autocast):
    shape, of_teacher, dtype, other, make = TAKEN[name]
    student, teacher, labels = torch.randn(shape, dtype=dtype), torch.randn(of_teacher, dtype=other), make()
    found = []
    for module in (loss.DistillationLoss(), llmkern.reference.DistillationLoss()):
        leaves = [t.clone().requires_grad_() for t in (student, teacher)]
        with torch.autocast("cpu", torch.bfloat16, enabled=under_autocast):
            result = module(*leaves, labels)
        found.append((result, *torch.autograd.grad(result, leaves)))
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype
        # The plain version rounds the softmax of 16 bits; ours does not.
        rtol, atol = (1e-2, 5e-4) if torch.bfloat16 in (dtype, other) else (1e-5, 1e-6)
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def test_linear_distillation_of_two_dtypes():
    leaves, taught = heads(20, (6,), 12, torch.float32), heads(20, (4,), 12, torch.bfloat16)
    leaves, targets = [t.requires_grad_() for t in leaves], classes(20, 12)
    found = []
    for module in (loss.LinearDistillationLoss(), llmkern.reference.LinearDistillationLoss()):
        result = module(*leaves[:2], *taught[:2], targets, leaves[2], taught[2])
        found.append((result, *torch.autograd.grad(result, leaves)))
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-3)
    with pytest.raises(TypeError, match="teacher_weight: expected the dtype of teacher_hidden"):
        module = loss.LinearDistillationLoss()
        module(*leaves[:2], taught[0], taught[1].half(), targets, leaves[2], taught[2])


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: loss.DistillationLoss(0.0), ValueError, "temperature: expected a positive number, got 0.0"),
        (lambda: loss.DistillationLoss(alpha="a"), TypeError, "alpha: expected a number, got 'a'"),
        (lambda: llmkern.LinearCrossEntropyLoss(reduction="all"), ValueError, "reduction: expected one of none"),
        (lambda: llmkern.LinearCrossEntropyLoss(label_smoothing=2.0), ValueError, "label_smoothing: "),
        (lambda: llmkern.LinearCrossEntropyLoss(1.5), TypeError, "ignore_index: expected an integer, got 1.5"),
        (lambda: llmkern.CrossEntropyLoss(z_loss=None), TypeError, "z_loss: expected a number, got None"),
    ],
)
def test_bad_options_of_modules(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_forward_mode_is_refused():
    leaves, targets = arguments()
    x, hidden, weight, bias, teacher = (t.detach() for t in leaves)
    for function, at in (
        (lambda x: functional.cross_entropy(x, targets), x),
        (lambda x: functional.distillation(x, teacher, targets), x),
        (lambda h: functional.linear_cross_entropy(h, weight, targets, bias), hidden),
        (lambda h: functional.linear_distillation(h, weight, hidden, weight, targets), hidden),
    ):
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.jvp(function, (at,), (at,))
