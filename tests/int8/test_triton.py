"""The Triton kernels of this family: run by the interpreter, and why they cannot serve a call."""

from __future__ import annotations

import re

import pytest
import torch

from llmkern import backend
from llmkern import triton as launches
from llmkern.int8 import op, reference, triton_gradient_launch, triton_launch
from llmkern.verify import verify
from tests.amd import gfx942
from tests.emulation.triton_interpreter import run_tests
from tests.int8.cases import QUANTIZATIONS, inputs, positional, quantized, with_outliers

pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux)")


def test_in_the_interpreter():
    report = run_tests("tests/int8/interpreted_triton.py")
    assert re.search(r"\d{2,} passed", report.strip().splitlines()[-1]), report


def arguments(dtype=torch.float32, bias=None, rotate=1):
    x, weight, scale, _ = inputs((3, 64, 5), dtype)
    return x, weight, scale, bias, None, None, "row", 0, rotate, "none"


def test_what_it_cannot_serve(monkeypatch):
    assert triton_launch.TRITON_INT8_LINEAR.unsupported(*arguments()) == "the tensors are on cpu, not on a GPU"
    monkeypatch.setattr("llmkern.triton.unsupported", lambda x: None)
    refused = triton_launch.TRITON_INT8_LINEAR.unsupported
    assert refused(*arguments()) is None
    assert refused(*arguments(rotate=4)) is None
    assert "transform at most 256 elements" in refused(*arguments(rotate=512))
    gradient = triton_gradient_launch.TRITON_INT8_LINEAR_BACKWARD.unsupported
    x, weight, scale, *_ = arguments()
    assert gradient(x, weight, scale, 0, 4) is None
    assert "transform at most 256 elements" in gradient(x, weight, scale, 0, 512)
    assert "grad is torch.float64" in gradient(x.double(), weight, scale, 0, 1)
    assert "x is torch.float64" in refused(torch.ones(3, 64).double(), *arguments()[1:])
    assert "bias is torch.float64" in refused(*arguments(bias=torch.zeros(5).double()))
    deep = torch.empty(1, 2**17, device="meta"), torch.empty(1, 2**17, dtype=torch.int8, device="meta")
    assert "int32 sums could overflow" in refused(*deep, *arguments()[2:])


@pytest.mark.parametrize(
    ("family", "rows", "group", "described"),
    [("sm_80", 512, 0, False), ("sm_90", 512, 0, True), ("sm_90", 16, 0, False), ("sm_90", 17, 128, True),
     ("sm_120", 64, 0, True), ("gfx942", 512, 0, False)],
)  # fmt: skip
def test_which_launches_have_descriptors(family, rows, group, described):
    """Weights whose rows lie anywhere come from a copy with rows of whole 16 bytes."""
    x, weight = torch.zeros(rows, 1025), torch.zeros(40, 1025, dtype=torch.int8)
    scale = torch.ones((40, -(-1025 // group)) if group else (40,))
    found: list[launches.Launch] = []
    args = (x, weight, scale, None, None, None, "row", group, 1, "none")
    triton_launch.plan(found.append, family, *args)(*args)
    product = next(x for x in found if x.kernel in ("linear_kernel", "split_kernel", "split_groups_kernel"))
    types, _ = launches.signature(product)
    assert product.constants["DESCRIBED"] == described
    assert types["low"].startswith("tensordesc<i8[") == types["weight"].startswith("tensordesc<i8[") == described
    if described:
        given = dict(zip(launches.function(product).arg_names, launches.placed(product), strict=False))["weight"]
        assert given.shape == [40, 1025] and given.strides == [1040, 1] and given.base.data_ptr() % 16 == 0
        assert given.block_shape == [product.constants["COLUMNS"], product.constants["DEPTH"]]


@pytest.mark.parametrize(
    ("rows", "inputs", "group", "rotate"),
    [(8, "row", 128, 1), (8, "16bit", 0, 4), (512, "row", 0, 1), (512, "row", 128, 1)],
)
def test_compiles_for_amd(rows, inputs, group, rotate):
    """No spills, and matrix instructions; waves of 64."""
    x = torch.empty(rows, 4096, device="meta", dtype=torch.bfloat16)
    weight = torch.empty(4096, 4096, device="meta", dtype=torch.int8)
    scale = torch.empty((4096, 32) if group else (4096,), device="meta")
    found: list[launches.Launch] = []
    args = (x, weight, scale, None, None, None, inputs, group, rotate, "none")
    triton_launch.plan(found.append, "gfx942", *args)(*args)
    gradient = (x, weight, scale, group, rotate)
    triton_gradient_launch.plan(found.append, *gradient)(*gradient)
    for launch in found:
        code = gfx942(launch)
        products = launch.kernel in ("linear_kernel", "split_kernel", "split_groups_kernel", "gradient_kernel")
        assert ("v_mfma" in code) == products, launch.kernel


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_the_gpu(dtype):
    for name, kw in QUANTIZATIONS.items():
        options = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in kw.items()}
        for shape in ((1, 4096, 100), (9, 320, 70), (130, 1024, 400)):
            x, _, _, bias = (t.cuda() for t in inputs(shape, dtype))
            weight, scale = (t.cuda() for t in quantized(torch.randn(shape[2], shape[1]), **kw))

            def function(x, bias, weight=weight, scale=scale, options=options):
                with backend.use("triton"):
                    return op.int8_linear(x, weight, scale, bias, **options)

            def plain(x, bias, weight=weight, scale=scale, options=options):
                return reference.int8_linear(x, weight, scale, bias, *positional(**options))

            report = verify(function, plain, (with_outliers(x), bias), gradients=False)
            assert report, (name, shape, str(report))
