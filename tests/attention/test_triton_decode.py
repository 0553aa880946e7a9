"""Triton's attention on a cache: run by the interpreter, compiled for AMD, and what a call needs.

tests/emulation/test_ptx_decode_triton.py executes what the compiler makes of it; tests/test_inspect.py holds it to its
registers.
"""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from llmkern.attention import triton_decode_launch
from llmkern.attention.triton_configurations import FAMILIES, decode_configuration
from tests.amd import gfx942
from tests.attention.decode_cases import on_the_gpu
from tests.attention.test_cuda_decode import call
from tests.emulation.triton_interpreter import run_tests


def test_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux)")
    report = run_tests("tests/attention/interpreted_triton_decode.py")
    assert re.search(r"\d{2,} passed", report.strip().splitlines()[-1]), report


@pytest.mark.parametrize(("width", "int8"), [(64, False), (128, True), (256, False)])
def test_compiled_for_amd(width, int8):
    """No spills; waves of 64."""
    for launch in triton_decode_launch.examples("gfx942", torch.bfloat16, width, int8, int8):
        code = gfx942(launch)
        assert "v_mfma_f32" in code or launch.kernel != "attention_decode_kernel"


CALLS = {
    "served": (call(), None),
    "odd heads": (call(width=13, value_width=7), None),
    "float32": (call(torch.float32), None),
    "wide": (call(width=264), "its kernels take heads of width 1 to 256, not 264"),
    "long": (call(tokens=2**28 + 1), "its kernels take up to 2^28 tokens of a sequence, not 268435457"),
}


@pytest.mark.parametrize(("arguments", "reason"), CALLS.values(), ids=CALLS)
def test_reasons(arguments, reason, monkeypatch):
    monkeypatch.setattr(triton_decode_launch, "unsupported", lambda x: None)
    assert triton_decode_launch.TRITON_KVCACHE.unsupported(*arguments) == reason


def test_reasons_of_layouts_and_pools(monkeypatch):
    assert triton_decode_launch.TRITON_KVCACHE.unsupported(torch.zeros(1, 1, 1, 8), *call()[1:]) == (
        "the tensors are on cpu, not on a GPU"
    )
    monkeypatch.setattr(triton_decode_launch, "unsupported", lambda x: None)
    query, k_cache, v_cache, *rest = call()
    reason = triton_decode_launch.TRITON_KVCACHE.unsupported(query, k_cache, v_cache.transpose(1, 3), *rest)
    assert reason == "its kernels write into caches whose last dimension is contiguous alone"
    many = query.expand(2**12, 2**12, 2, 64)
    assert "2^24 rows" in triton_decode_launch.limits(many, k_cache, v_cache, None)
    table = torch.empty(1, 1, dtype=torch.int32, device="meta")
    assert "pools" in triton_decode_launch.limits(query, k_cache[:0], v_cache[:0], table)


def test_every_call_has_a_configuration():
    for name in FAMILIES:
        for itemsize, width in itertools.product((2, 4), (16, 32, 64, 128, 256)):
            assert decode_configuration(name, itemsize, width).keys % 16 == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [40, 3000])
def test_on_the_gpu(tokens, dtype):
    out, expected, caches, others = on_the_gpu("triton", tokens, dtype)
    torch.testing.assert_close(out, expected)
    assert all(map(torch.equal, caches, others))
