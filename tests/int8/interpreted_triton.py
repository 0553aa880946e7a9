"""The Triton kernels of this family in Triton's interpreter; test_triton.py runs this file, in a process for it."""

from __future__ import annotations

import pytest
import torch

from llmkern import backend
from llmkern.int8 import op
from llmkern.int8.scheme import ACTIVATIONS
from llmkern.verify import verify
from tests.emulation.triton_interpreter import interpret, round_as_hardware
from tests.int8.cases import FLOATS, QUANTIZATIONS, SHAPES, of_scheme, plain
from tests.int8.on_triton import serve

round_as_hardware()
SCHEMES = {name: kw for name, kw in QUANTIZATIONS.items() if "rotate" not in kw}


@pytest.fixture(autouse=True)
def served(monkeypatch):
    serve(monkeypatch, interpret)
    yield
    backend.forget_plans()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [s for s in SHAPES.values() if s[0] < 500], ids=str)
def test_bit_for_bit(shape, scheme):
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
