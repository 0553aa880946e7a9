"""The PTX that Triton makes of the int8 kernels, against the reference, bit for bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from llmkern import backend, triton, triton_table
from llmkern.int8 import op, reference
from llmkern.int8.backward import input_gradient
from llmkern.int8.triton_configurations import TILES
from llmkern.triton_table import Line
from llmkern.verify import verify
from tests.emulation.ptx.launch import EmulationError
from tests.emulation.triton_on_ptx import Emulated
from tests.int8.cases import QUANTIZATIONS, inputs, of_scheme, positional
from tests.int8.on_triton import serve

pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux)")
SCHEMES = {name: kw for name, kw in QUANTIZATIONS.items() if "rotate" not in kw}
#: (M, K, N): few rows, and tiles of 64 and of 128 rows, with tails everywhere.
SHAPES = [(3, 131, 37), (20, 160, 70), (70, 96, 130)]


@pytest.fixture(autouse=True)
def forget():
    yield
    backend.forget_plans()


def served_by(monkeypatch, capability: int, schedule: str = "", **options) -> Emulated:
    """Calls run as the kernels for that capability, with its tiles and, from 90 on, its tensor descriptors."""
    emulated = Emulated(capability, schedule or ("lockstep", "reverse")[capability == 90], **options)
    serve(monkeypatch, emulated, f"sm_{capability}")
    return emulated


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes(scheme, capability, monkeypatch):
    served_by(monkeypatch, capability)
    at = list(SCHEMES).index(scheme)
    dtype = (torch.float32, torch.bfloat16, torch.float16)[at % 3]
    for shape in SHAPES if scheme in ("outliers", "groups of 96") else SHAPES[at % 3 : at % 3 + 1]:
        x, weight, scale, bias = of_scheme(shape, dtype, SCHEMES[scheme])
        got = op.int8_linear(x, weight, scale, bias, **SCHEMES[scheme])
        want = reference.int8_linear(x, weight, scale, bias, *positional(**SCHEMES[scheme]))
        assert torch.equal(got, want), shape


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", "swiglu", "geglu"])
def test_functions(activation, monkeypatch):
    serve(monkeypatch, Emulated(80))
    x, weight, scale, bias = of_scheme((5, 70, 48), torch.bfloat16, {})
    residual = torch.randn(5, 24 if activation in ("swiglu", "geglu") else 48).bfloat16()

    def function(x, bias, residual):
        return op.int8_linear(x, weight, scale, bias, residual=residual, activation=activation)

    def plain(x, bias, residual):
        return reference.int8_linear(x, weight, scale, bias, residual, None, "outliers", 0, 1, activation)

    verify(function, plain, (x, bias, residual), gradients=False).raise_if_failed()


@pytest.mark.parametrize(("capability", "product"), [(80, "mma.m16n8k32."), (90, "wgmma")])
def test_counts(capability, product, monkeypatch):
    """Products of 8-bit matrix instructions; those of high digits only where a row of the tile has one."""
    emulated = served_by(monkeypatch, capability, "lockstep", counts=True)
    x, weight, scale, bias = inputs((64, 512, 64), torch.bfloat16)
    x = x.clamp(-2, 2)
    issued = []
    for outlier in (False, True):
        x[5, 200] = 300.0 if outlier else 0.0
        op.int8_linear(x, weight, scale, bias)
        matrix = emulated.report_of("linear_kernel").counts.matrix
        assert matrix and all(product in kind and "s32.s8.s8" in kind for kind in matrix), matrix
        issued.append(sum(matrix.values()))
    assert issued[1] == issued[0] * 5 // 4  # one of four parts of 128 along k


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kw", [{}, {"inputs": "16bit"}, {"inputs": "row", "activation": "relu"}], ids=str)
def test_few_rows_split_along_k(kw, capability, monkeypatch):
    """Three parts of k, the last with a tail."""
    emulated = served_by(monkeypatch, capability)
    x, weight, scale, bias = of_scheme((3, 1100, 37), torch.bfloat16, kw)
    got = op.int8_linear(x, weight, scale, bias, **kw)
    assert torch.equal(got, reference.int8_linear(x, weight, scale, bias, *positional(**kw)))
    assert emulated.launched[1:] == [(3, "split_kernel"), (1, "gather_kernel")]


@pytest.mark.parametrize(("capability", "rows"), [(80, 3), (90, 3), (90, 19)])
def test_groups_of_few_rows_split_along_k(capability, rows, monkeypatch):
    """Two parts of five groups and of less than one; more than 16 rows come by descriptors."""
    emulated = served_by(monkeypatch, capability)
    kw = {"inputs": "row", "group": 96} if rows > 16 else {"inputs": "symmetric", "group": 128}
    x, weight, scale, bias = of_scheme((rows, 590, 37), torch.bfloat16, kw)
    verify(
        lambda x, bias: op.int8_linear(x, weight, scale, bias, **kw),
        lambda x, bias: reference.int8_linear(x, weight, scale, bias, *positional(**kw)), (x, bias), gradients=False,
    ).raise_if_failed()  # fmt: skip
    assert emulated.launched[1:] == [(2, "split_groups_kernel"), (-(-rows // 4), "gather_kernel")]
    assert ("cp.async.bulk.tensor" in emulated.ptx[1]) == (rows > 16)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("rotate", [4, 64])
def test_rotation(rotate, capability, monkeypatch):
    served_by(monkeypatch, capability)
    kw = {"inputs": "row", "rotate": rotate}
    x, weight, scale, bias = of_scheme((5, 1024 if rotate == 64 else 192, 21), torch.float32, kw)
    assert torch.equal(
        op.int8_linear(x, weight, scale, bias, **kw), reference.int8_linear(x, weight, scale, bias, *positional(**kw))
    )


def test_the_largest_tile(monkeypatch):
    """Of many rows with one digit on Hopper: 256 columns, whose results are made in four pieces."""
    emulated = served_by(monkeypatch, 90)
    with triton_table.using([Line("int8", "up to 64", "sm_90", 0, vars(TILES["many"]["sm_90"]))]):
        x, weight, scale, bias = of_scheme((40, 130, 200), torch.bfloat16, {"inputs": "row"})
        residual = torch.randn(40, 200).bfloat16()
        got = op.int8_linear(x, weight, scale, bias, residual=residual, inputs="row")
    assert torch.equal(got, reference.int8_linear(x, weight, scale, bias, *positional(inputs="row", residual=residual)))
    ptx = emulated.ptx[-1]
    assert "cp.async.bulk.tensor.2d" in ptx and "cp.async.cg" not in ptx and "ld.global.v4" not in ptx.split("wgmma")[0]


def test_a_descriptor_that_ends_too_late_is_found(monkeypatch):
    """Boxes are cut at the matrix's edge by its shape: one row more, and a copy reads beyond the buffer."""
    emulated = Emulated(90)

    class Larger(triton.Descriptor):
        shape = property(lambda self: (self.tensor.shape[0] + 1, self.tensor.shape[1]))

    def run(launch):
        if launch.kernel == "linear_kernel":
            described = lambda x: isinstance(x, triton.Descriptor)  # noqa: E731
            given = [Larger(x.tensor, x.block) if described(x) else x for x in launch.arguments]
            launch = dataclasses.replace(launch, arguments=tuple(given))
        emulated(launch)

    serve(monkeypatch, run, "sm_90")
    x, weight, scale, bias = of_scheme((70, 128, 16), torch.bfloat16, {"inputs": "row"})
    with pytest.raises(EmulationError, match="out of bounds"):
        op.int8_linear(x, weight, scale, bias, inputs="row")


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("shape", "group", "rotate", "dtype"),
    [
        ((3, 70, 37), 0, 1, torch.float16),
        ((131, 140, 50), 0, 1, torch.bfloat16),
        ((70, 130, 34), 32, 1, torch.bfloat16),
        ((20, 128, 40), 64, 2, torch.float32),
    ],
)
def test_gradient_of_the_input(shape, group, rotate, dtype, capability, monkeypatch):
    served_by(monkeypatch, capability)
    _, weight, scale, _ = of_scheme(shape, dtype, {"group": group})
    verify(
        lambda grad: input_gradient(grad, weight, scale, group, rotate),
        lambda grad: reference.input_gradient(grad, weight, scale, group, rotate),
        (torch.randn(shape[0], shape[2]).to(dtype),), gradients=False,
    ).raise_if_failed()  # fmt: skip
