"""The Triton kernels of this family in Triton's interpreter; test_triton.py runs this file, in a process for it."""

from __future__ import annotations

import pytest
import torch

from llmkern import backend
from llmkern.int8 import op, reference
from llmkern.int8.backward import input_gradient
from llmkern.int8.scheme import ACTIVATIONS
from llmkern.verify import verify
from tests.emulation.triton_interpreter import interpret, round_as_hardware
from tests.int8.cases import FLOATS, QUANTIZATIONS, SHAPES, of_scheme, plain
from tests.int8.on_triton import serve

round_as_hardware()
SCHEMES = {name: kw for name, kw in QUANTIZATIONS.items() if "rotate" not in kw}
ROTATED = {name: kw for name, kw in QUANTIZATIONS.items() if "rotate" in kw} | {
    "groups, rotated": {"inputs": "symmetric", "group": 32, "rotate": 8},
    "16bit, rotated": {"inputs": "16bit", "rotate": 4},
}


@pytest.fixture(autouse=True)
def served(monkeypatch):
    serve(monkeypatch, interpret)
    yield
    backend.forget_plans()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [s for s in SHAPES.values() if s[0] < 500], ids=str)
def test_bit_for_bit(shape, scheme):
    if SCHEMES[scheme].get("group") and shape[1] > 512:
        return  # split along k: test_few_rows_with_groups
    dtype = FLOATS[(list(SCHEMES).index(scheme) + shape[1]) % 3]
    x, weight, scale, bias = of_scheme(shape, dtype, SCHEMES[scheme])
    got = op.int8_linear(x, weight, scale, bias, **SCHEMES[scheme])
    assert torch.equal(got, plain(x, weight, scale, bias, **SCHEMES[scheme]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("scheme", ["outliers", "groups of 32", "groups of 64 by row"])
def test_functions_and_residuals(activation, scheme):
    kw = {**SCHEMES[scheme], "activation": activation}
    for dtype in FLOATS:
        x, weight, scale, bias = of_scheme((19, 70, 48), dtype, kw)
        residual = torch.randn(19, 24 if activation in ("swiglu", "geglu") else 48).to(dtype)
        function = lambda x, bias, residual, w=weight, s=scale: op.int8_linear(  # noqa: E731
            x, w, s, bias, residual=residual, **kw
        )
        truth = lambda x, bias, residual, w=weight, s=scale: plain(x, w, s, bias, residual=residual, **kw)  # noqa: E731
        verify(function, truth, (x, bias, residual), gradients=False).raise_if_failed()


def test_rows_with_nan_or_infinity_are_nan_alone():
    for scheme, kw in SCHEMES.items():
        x, weight, scale, bias = of_scheme((6, 200, 20), torch.float32, kw)
        x[1, 3], x[2, 150], x[4] = torch.nan, -torch.inf, 3e38
        got, want = op.int8_linear(x, weight, scale, bias, **kw), plain(x, weight, scale, bias, **kw)
        assert torch.equal(got.isnan(), want.isnan()) and got[1].isnan().all() and not got[0].isnan().any(), scheme
        assert torch.equal(got.nan_to_num(), want.nan_to_num()), scheme


def test_zeros_and_tiny_rows():
    for kw in SCHEMES.values():
        x, weight, scale, bias = of_scheme((4, 130, 9), torch.float32, kw)
        x[0], x[1] = 0.0, x[1] * 1e-41
        assert torch.equal(op.int8_linear(x, weight, scale, bias, **kw), plain(x, weight, scale, bias, **kw))


def test_strides_and_a_given_output():
    x, weight, scale, bias = of_scheme((2, 96, 34), torch.float32, {})
    expected = plain(x, weight, scale, bias)
    apart = torch.full((2, 100), torch.nan)[:, 2:98].copy_(x)
    for given in (apart, x.t().contiguous().t(), torch.stack([x, x], -1).flatten(1)[:, ::2]):
        assert torch.equal(op.int8_linear(given, weight, scale, bias), expected)
    for columns in (weight.t().contiguous().t(), torch.cat([weight, weight], 1)[:, :96]):
        assert torch.equal(op.int8_linear(x, columns, scale, bias), expected)
    assert torch.equal(op.int8_linear(x, weight, torch.stack([scale, scale], 1)[:, 0], bias), expected)
    room = torch.full((4, 40), 7.0)
    op.int8_linear(x, weight, scale, bias, out=room[1:3, 3:37])
    assert torch.equal(room[1:3, 3:37], expected)
    room[1:3, 3:37] = 7.0
    assert (room == 7.0).all()


@pytest.mark.parametrize("scheme", ROTATED)
def test_rotated_bit_for_bit(scheme):
    kw = ROTATED[scheme]
    for shape, dtype in zip([(1, 128, 5), (7, 640, 33), (19, 256, 70)], FLOATS, strict=True):
        x, weight, scale, bias = of_scheme(shape, dtype, kw)
        assert torch.equal(op.int8_linear(x, weight, scale, bias, **kw), plain(x, weight, scale, bias, **kw)), shape


@pytest.mark.parametrize("rotate", [2, 8, 64, 256])
def test_rotations_of_every_size(rotate):
    x, weight, scale, bias = of_scheme((3, 16 * rotate, 9), torch.float32, {})
    x[1, 5] = torch.inf
    kw = {"inputs": "row", "rotate": rotate}
    got, want = op.int8_linear(x, weight, scale, bias, **kw), plain(x, weight, scale, bias, **kw)
    assert torch.equal(got.isnan(), want.isnan()) and got[1].isnan().all() and not got[0].isnan().any()
    assert torch.equal(got.nan_to_num(), want.nan_to_num())


@pytest.mark.parametrize("scheme", ["outliers", "16bit", "row", "static"])
@pytest.mark.parametrize("shape", [(1, 513, 1), (16, 1100, 70), (5, 1536, 129), (40, 1100, 70)], ids=str)
def test_few_rows_split_along_k(shape, scheme, monkeypatch):
    launches = []
    family = "sm_90" if shape[0] > 16 else "sm_80"
    serve(monkeypatch, lambda launch: (launches.append(launch), interpret(launch))[1], family)
    kw = {**SCHEMES[scheme]}
    x, weight, scale, bias = of_scheme(shape, torch.float32, kw)
    assert torch.equal(op.int8_linear(x, weight, scale, bias, **kw), plain(x, weight, scale, bias, **kw))
    assert [launch.kernel for launch in launches] == ["quantize_kernel", "split_kernel", "gather_kernel"]
    assert launches[1].grid == (-(-shape[2] // 64), -(-shape[1] // 512))


@pytest.mark.parametrize("scheme", [name for name, kw in SCHEMES.items() if "group" in kw])
@pytest.mark.parametrize(
    ("shape", "family"), [((1, 768, 96), "sm_80"), ((7, 1100, 34), "sm_90"), ((19, 700, 5), "sm_90")], ids=str
)
def test_few_rows_with_groups(shape, family, scheme, monkeypatch):
    """Split along k in whole groups, and added as floats."""
    launches = []
    serve(monkeypatch, lambda launch: (launches.append(launch), interpret(launch))[1], family)
    kw = SCHEMES[scheme]
    group = kw["group"]
    for dtype, activation in ((torch.float32, "none"), (torch.bfloat16, "relu" if shape[2] % 2 else "swiglu")):
        x, weight, scale, bias = of_scheme(shape, dtype, kw)
        of_call = {**kw, "activation": activation}
        function = lambda x, bias, w=weight, s=scale, kw=of_call: op.int8_linear(x, w, s, bias, **kw)  # noqa: E731
        truth = lambda x, bias, w=weight, s=scale, kw=of_call: plain(x, w, s, bias, **kw)  # noqa: E731
        verify(function, truth, (x, bias), gradients=False).raise_if_failed()
    kernels = [launch.kernel for launch in launches]
    assert kernels[:3] == kernels[3:] == ["quantize_kernel", "split_groups_kernel", "gather_kernel"]
    each = -(-512 // group) * group
    assert launches[1].grid == (-(-shape[2] // 64), -(-shape[1] // each))
    assert launches[1].constants["DESCRIBED"] == (shape[0] > 16)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_by_descriptors(scheme, monkeypatch):
    """As on Hopper and newer, with tails in every dimension, and columns that do not lie at multiples of 16 bytes."""
    launches = []
    serve(monkeypatch, lambda launch: (launches.append(launch), interpret(launch))[1], "sm_90")
    calls = [((70, 131, 37), "none")]
    if scheme in ("outliers", "groups of 96"):
        calls += [((129, 48, 150), "none"), ((130, 33, 34), "swiglu")]
    for shape, activation in calls:
        kw = {**SCHEMES[scheme], "activation": activation}
        x, weight, scale, bias = of_scheme(shape, FLOATS[shape[1] % 3], kw)
        got, want = op.int8_linear(x, weight, scale, bias, **kw), plain(x, weight, scale, bias, **kw)
        assert torch.equal(got, want) or (activation == "swiglu" and verify(
            lambda x, w=weight, s=scale, b=bias, kw=kw: op.int8_linear(x, w, s, b, **kw),
            lambda x, w=weight, s=scale, b=bias, kw=kw: plain(x, w, s, b, **kw), (x,), gradients=False,
        ))  # fmt: skip
    assert [launch.constants["DESCRIBED"] for launch in launches if launch.kernel == "linear_kernel"].count(
        True
    ) >= len(calls)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_functions_behind_a_split(activation):
    x, weight, scale, bias = of_scheme((3, 700, 48), torch.bfloat16, {})
    residual = torch.randn(3, 24 if activation in ("swiglu", "geglu") else 48).bfloat16()

    def function(x, bias, residual):
        return op.int8_linear(x, weight, scale, bias, residual=residual, activation=activation)

    def truth(x, bias, residual):
        return plain(x, weight, scale, bias, residual=residual, activation=activation)

    verify(function, truth, (x, bias, residual), gradients=False).raise_if_failed()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("group", "rotate"), [(0, 1), (32, 1), (96, 1), (0, 4), (64, 2)])
def test_gradient_of_the_input(group, rotate, dtype):
    for shape in [(1, 64, 1), (7, 192, 67), (131, 192, 34)]:
        _, weight, scale, _ = of_scheme(shape, dtype, {"group": group})
        grad = torch.randn(shape[0], shape[2]).to(dtype)
        function = lambda grad, w=weight, s=scale: input_gradient(grad, w, s, group, rotate)  # noqa: E731
        truth = lambda grad, w=weight, s=scale: reference.input_gradient(grad, w, s, group, rotate)  # noqa: E731
        verify(function, truth, (grad,), gradients=False).raise_if_failed()


def test_gradient_of_what_lies_otherwise():
    _, weight, scale, _ = of_scheme((5, 70, 20), torch.float32, {})
    grad = torch.randn(5, 1).expand(5, 20)
    want = input_gradient(grad.contiguous(), weight, scale, 0, 1)
    for given in (grad, torch.full((5, 26), torch.nan)[:, 3:23].copy_(grad), grad.t().contiguous().t()):
        for columns in (weight, weight.t().contiguous().t()):
            assert torch.equal(input_gradient(given, columns, scale, 0, 1), want)
    for shape in ((0, 8, 4), (3, 0, 4), (3, 8, 0)):
        empty = input_gradient(
            torch.ones(shape[0], shape[2]), torch.ones(shape[2], shape[1]).char(), torch.ones(shape[2]), 0, 1
        )
        assert empty.shape == shape[:2] and not empty.any()


def test_gradient_that_is_infinite():
    weight, scale, grad = torch.full((4, 6), 3, dtype=torch.int8), torch.ones(4), torch.ones(3, 4)
    grad[0, 1], grad[1, 2] = torch.inf, torch.nan
    for dtype in FLOATS:
        got = input_gradient(grad.to(dtype), weight, scale, 0, 1)
        assert (got[0] == torch.inf).all() and got[1].isnan().all() and (got[2] == 12).all()


def test_autograd_asks_this_kernel(monkeypatch):
    launches = []
    serve(monkeypatch, lambda launch: (launches.append(launch.kernel), interpret(launch))[1])
    x, weight, scale, bias = of_scheme((3, 64, 5), torch.float32, {})
    (grad,) = torch.autograd.grad(op.int8_linear(x.requires_grad_(), weight, scale, bias, rotate=2).sum(), x)
    assert launches[-2:] == ["gradient_kernel", "hadamard_kernel"]
    torch.testing.assert_close(grad, reference.input_gradient(torch.ones(3, 5), weight, scale, 0, 2))
