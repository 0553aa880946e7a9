"""torch.func over every operator: grad, jacrev, vmap and their compositions give what the plain version's do."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.func import grad, jacrev, jvp, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from llmkern.activation import reference as activation
from llmkern.functional import (
    cross_entropy,
    distillation,
    gated,
    int8_linear,
    layer_norm,
    linear_cross_entropy,
    linear_distillation,
    rms_norm,
    rotary,
    scaled_dot_product_attention,
    sinusoidal_add,
)
from llmkern.int8 import reference as int8
from llmkern.loss import reference as loss
from llmkern.norm import reference as norm
from llmkern.positional import reference as positional
from llmkern.verify.report import judge_row


@pytest.fixture(autouse=True)
def no_fallback():
    """Torch warns where there is no batching rule."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*performance drop.*")
        yield


torch.manual_seed(3)
TABLES = torch.randn(9, 3), torch.randn(9, 3)
IDS = torch.randint(9, (2, 5))
WEIGHT, SCALE, BIAS = torch.randint(-127, 128, (6, 8), dtype=torch.int8), torch.rand(6) / 100, torch.randn(6)
PE, SEED = torch.randn(7, 1, 8), torch.tensor(4)
CLASSES, HEAD, TAUGHT = torch.tensor([3, 0, -100, 7, 3]), torch.randn(8, 6), torch.randn(5, 8)
MASK = torch.randn(2, 1, 5, 5)
Q, K = torch.randn(2, 1, 5, 8), torch.randn(2, 2, 5, 8)


def both(of_q_and_k):
    return of_q_and_k[0].sin().sum() + of_q_and_k[1].square().sum()


def plain_attention(x):
    return F.scaled_dot_product_attention(x, x, x * 2, MASK).sin().sum()


# name: (a sample's shape, ours, the plain one); each gives a scalar
FUNCTIONS = {
    "attention": (
        (2, 3, 5, 8), lambda x: scaled_dot_product_attention(x, x, x * 2, MASK).sin().sum(), plain_attention,
    ),
    "rotary": (
        (2, 3, 5, 8),
        lambda x: both(rotary(x, x[:, :1] * 2, *TABLES)),
        lambda x: both(positional.rotary(x, x[:, :1] * 2, *TABLES)),
    ),
    "rotary of queries alone": (
        (2, 3, 5, 8),
        lambda x: rotary(x, None, *TABLES, position_ids=IDS[0])[0].sin().sum(),
        lambda x: positional.rotary(x, None, *TABLES, position_ids=IDS[0])[0].sin().sum(),
    ),
    "rotary of one key for all samples": (
        (2, 3, 5, 8),
        lambda x: both(rotary(x, K, *TABLES, position_ids=IDS)),
        lambda x: both(positional.rotary(x, K, *TABLES, position_ids=IDS)),
    ),
    "rotary's tables": (
        (9, 3),
        lambda x: both(rotary(Q, K, x, x * 2)),
        lambda x: both(positional.rotary(Q, K, x, x * 2)),
    ),
    "rotary in place": (
        (2, 3, 5, 8),
        lambda x: both(rotary(x * 1, x[:, :1] * 2, *TABLES, inplace=True)),
        lambda x: both(positional.rotary(x, x[:, :1] * 2, *TABLES)),
    ),
    "layer norm with a residual": (
        (5, 8),
        lambda x: both(layer_norm(x, PE[0, 0], PE[1, 0], residual=x * 2)),
        lambda x: both(norm.norm(x, x * 2, PE[0, 0], PE[1, 0], 1e-5, 0.0, True)[:2]),
    ),
    "rms norm's weight": (
        (8,),
        lambda x: rms_norm(PE[:5, 0], x, offset=1.0).sin().sum(),
        lambda x: norm.norm(PE[:5, 0], None, x, None, 1e-6, 1.0, False)[0].sin().sum(),
    ),
    "a gated activation": (
        (5, 8), lambda x: gated(x, x * 2, "gelu").sin().sum(), lambda x: activation.gated(x, x * 2, "gelu").sin().sum(),
    ),
    "cross entropy": (
        (5, 8),
        lambda x: cross_entropy(x, CLASSES, label_smoothing=0.1, z_loss=0.1, reduction="none").sin().sum(),
        lambda x: loss.cross_entropy(x, CLASSES, -100, 0.1, 0.1)[0].sin().sum(),
    ),
    "distillation": (
        (5, 8),
        lambda x: distillation(x, x.square(), CLASSES, temperature=2.0),
        lambda x: loss.combined(*loss.distillation(x, x.square(), CLASSES, 2.0, -100)[:2], CLASSES, 2.0, 0.3, -100),
    ),
    "linear cross entropy": (
        (5, 6),
        lambda x: linear_cross_entropy(x, HEAD, CLASSES).sin(),
        lambda x: (loss.cross_entropy(x @ HEAD.T, CLASSES, -100, 0.0, 0.0)[0].sum() / 4).sin(),
    ),
    "linear cross entropy's weight": (
        (8, 6),
        lambda x: linear_cross_entropy(TAUGHT[:, :6], x, CLASSES, reduction="none").sin().sum(),
        lambda x: loss.cross_entropy(TAUGHT[:, :6] @ x.T, CLASSES, -100, 0.0, 0.0)[0].sin().sum(),
    ),
    "linear distillation": (
        (5, 6),
        lambda x: linear_distillation(x, HEAD, TAUGHT, MASK[0, 0, 0].repeat(8, 8)[:, :8], CLASSES).sin(),
        lambda x: loss.linear_distillation_loss(
            x, HEAD, None, TAUGHT, MASK[0, 0, 0].repeat(8, 8)[:, :8], None, CLASSES, 4.0, 0.3, -100
        )[0].sin(),
    ),
    "sinusoidal add": (
        (5, 2, 8),
        lambda x: sinusoidal_add(x, PE, scale=2.0).sin().sum(),
        lambda x: positional.sinusoidal_add(x, PE, 2.0).sin().sum(),
    ),
    "sinusoidal add's table": (
        (7, 1, 8),
        lambda x: sinusoidal_add(PE[:5].expand(5, 2, 8), x).sin().sum(),
        lambda x: positional.sinusoidal_add(PE[:5].expand(5, 2, 8), x).sin().sum(),
    ),
    "dropout": (
        (5, 2, 8),
        lambda x: sinusoidal_add(x, PE, dropout_p=0.4, seed=SEED).sin().sum(),
        lambda x: positional.sinusoidal_add(x, PE, 1.0, 0.4, SEED).sin().sum(),
    ),
    "int8 linear": (
        (3, 8), lambda x: int8_linear(x, WEIGHT, SCALE, BIAS).sin().sum(),
        # Straight through the rounding: the gradient at the quantised values.
        lambda x: int8.int8_linear(x, WEIGHT, SCALE, BIAS).sin().sum(),
    ),
    "int8 linear's bias": (
        (6,),
        lambda x: int8_linear(PE[:, 0], WEIGHT, SCALE, x).sin().sum(),
        lambda x: int8.int8_linear(PE[:, 0], WEIGHT, SCALE, x).sin().sum(),
    ),
}  # fmt: skip
EVERY = pytest.mark.parametrize(("shape", "ours", "plain"), FUNCTIONS.values(), ids=FUNCTIONS)


def gradient(function, x):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf)[0]


@EVERY
def test_grad_and_jacrev(shape, ours, plain):
    x = torch.randn(shape)
    expected = gradient(plain, x)
    torch.testing.assert_close(grad(ours)(x), expected)
    jacobian = jacrev(lambda x: ours(x) * torch.tensor([1.0, 3.0]))(x)  # vmap over the backward
    torch.testing.assert_close(jacobian, torch.stack([expected, expected * 3]))


@EVERY
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_vmap_and_its_gradients(shape, ours, plain, dim):
    samples = [torch.randn(shape) for _ in range(3)]
    x = torch.stack(samples, dim)
    torch.testing.assert_close(vmap(ours, dim)(x), torch.stack([plain(s) for s in samples]))
    expected = torch.stack([gradient(plain, s) for s in samples])
    torch.testing.assert_close(vmap(grad(ours), dim)(x), expected)
    torch.testing.assert_close(grad(lambda x: vmap(ours, dim)(x).sum())(x).movedim(dim, 0), expected)


#: Torch's own arithmetic with one number of each of no samples raises.
NUMBERS = ("distillation", "linear cross entropy", "linear distillation")


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in NUMBERS])
def test_no_samples(name):
    shape, ours, _ = FUNCTIONS[name]
    assert vmap(ours)(torch.empty(0, *shape)).shape == (0,)
    assert vmap(grad(ours))(torch.empty(0, *shape)).shape == (0, *shape)


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n.startswith(("rotary", "sinus", "dropout"))])
def test_second_derivatives_where_the_operator_is_linear(name):
    shape, ours, plain = FUNCTIONS[name]
    x = torch.randn(shape)
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(plain(leaf), leaf, create_graph=True)
    (expected,) = torch.autograd.grad(first.square().sum(), leaf)
    torch.testing.assert_close(grad(lambda x: grad(ours)(x).square().sum())(x), expected)


def test_a_second_derivative_of_attention():
    _, ours, plain = FUNCTIONS["attention"]
    x = torch.randn(2, 3, 5, 8)
    with sdpa_kernel(SDPBackend.MATH):  # torch's others have no second derivative
        found, single = (grad(lambda x, f=f: grad(f)(x).square().sum())(x) for f in (ours, plain))
        truth = grad(lambda x: grad(plain)(x).square().sum())(x.double())
    row = judge_row("x", "gradient", found, single, truth)
    assert row.passed, row


def test_positions_of_each_sample():
    q, ids = torch.randn(4, 2, 3, 5, 8), torch.randint(9, (4, 5))
    expected = torch.stack(
        [positional.rotary(a, None, *TABLES, position_ids=i)[0] for a, i in zip(q, ids, strict=True)]
    )
    torch.testing.assert_close(vmap(lambda q, i: rotary(q, None, *TABLES, position_ids=i)[0])(q, ids), expected)
    both = ids[:, None].expand(4, 2, 5)
    torch.testing.assert_close(vmap(lambda q, i: rotary(q, None, *TABLES, position_ids=i)[0])(q, both), expected)


def test_the_operator_in_place_refuses_gradients_at_every_level():
    def function(x):
        y = x * 1
        torch.ops.llmkern.rotary_(y, None, *TABLES, None, False, False)
        return y.sum()

    x = torch.randn(2, 3, 5, 8)
    leaf = x.clone().requires_grad_()
    for call in (
        lambda: function(leaf),
        lambda: grad(function)(x),
        lambda: grad(lambda x: vmap(function)(x).sum())(x[None]),
    ):
        with pytest.raises(RuntimeError, match="rotary_ has no gradient"):
            call()


@pytest.mark.parametrize("direct", [False, True], ids=["the function", "the operator"])
def test_in_place_each_sample_is_written_and_a_shared_one_refused(direct):
    def rotate(q, k):
        if direct:
            torch.ops.llmkern.rotary_(q, k, *TABLES, None, False, False)
        else:
            rotary(q, k, *TABLES, inplace=True)
        return q, k

    q, k = torch.randn(4, 2, 3, 5, 8), torch.randn(4, 2, 1, 5, 8)
    expected = rotary(q.flatten(0, 1), k.flatten(0, 1), *TABLES)
    got = q.clone(), k.clone()
    vmap(rotate)(*got)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.flatten(0, 1), b)
    shared = (q[0], k), (q, k[:1].expand_as(k))
    for q, k in shared:
        before = q.clone(), k.clone()
        with pytest.raises((ValueError, RuntimeError), match=r"q: .*one tensor|k: .*memory|inplace arithmetic"):
            vmap(rotate, (0 if q.dim() == 5 else None, 0))(q, k)
        assert torch.equal(q, before[0]) and torch.equal(k, before[1])


def test_in_place_gradients_refuse_shared_memory_through_the_transforms():
    x = torch.randn(2, 3, 5, 8)

    def function(x):
        y = x * 1
        return both(rotary(y, y[:, :1], *TABLES, inplace=True))

    for transformed, given in ((grad(function), x), (vmap(grad(function)), torch.stack([x, x]))):
        with pytest.raises(ValueError, match="k: expected memory of its own"):
            transformed(given)


@EVERY
def test_forward_mode_is_refused_wherever_it_enters(shape, ours, plain):
    x = torch.randn(shape)
    for function, given in ((ours, x), (grad(ours), x), (vmap(ours), x[None])):
        with pytest.raises(NotImplementedError, match="forward-mode"):
            jvp(function, (given,), (given,))


NO_RULES = (None, None, None, None, None, -1, -1, False, 0.0, 0.0)


def test_forward_mode_of_the_operators_themselves_is_refused():
    x = torch.randn(2, 3, 5, 8)
    calls = [
        lambda x: torch.ops.llmkern.rotary(x, None, *TABLES, None, False, False)[0],
        lambda x: torch.ops.llmkern.attention(x, x, x, *NO_RULES, 1.0, False)[0],
        lambda x: torch.ops.llmkern.int8_linear(x, WEIGHT, SCALE, None, None, None, "row", 0, 1, "none"),
    ]
    for call in calls:
        with pytest.raises(NotImplementedError, match="forward-mode"):
            jvp(call, (x,), (x,))
