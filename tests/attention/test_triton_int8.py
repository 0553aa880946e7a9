"""Triton's attention of quantised queries and keys: run by the interpreter, compiled for AMD, and what a call needs.

tests/emulation/test_ptx_attention_int8_triton.py executes what the compiler makes of it; tests/test_inspect.py holds it
to its registers.
"""

from __future__ import annotations

import re

import pytest
import torch

from llmkern import backend
from llmkern.attention import triton_int8_launch
from tests.amd import gfx942
from tests.attention.cases import tensors
from tests.attention.int8_cases import HALVES, NAMES, attend, rules_of, shifted
from tests.emulation.triton_interpreter import run_tests


def test_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux)")
    report = run_tests("tests/attention/interpreted_triton_int8.py")
    assert re.search(r"\d{2,} passed", report.strip().splitlines()[-1]), report


@pytest.mark.parametrize("width", [64, 128])
def test_compiled_for_amd(width):
    """No spills, and the matrix instructions of integers; waves of 64."""
    for launch in triton_int8_launch.examples("gfx942", torch.bfloat16, width):
        code = gfx942(launch)
        if launch.kernel == "attention_int8_kernel":
            assert "v_mfma_i32" in code and "v_mfma_f32" in code


def call(shape=(1, 2, 1, 3, 5, 64, 64), dtype=torch.bfloat16, mask=None):
    batch, heads, kv_heads, queries, keys, width, value_width = shape
    x = torch.empty(1, dtype=dtype, device="meta")
    q, k, v = (
        x.expand(batch, h, s, d)
        for h, s, d in ((heads, queries, width), (kv_heads, keys, width), (kv_heads, keys, value_width))
    )
    return q, k, v, mask, None, None, None, -1, 0, False, 0.0, 0.125, True


CALLS = {
    "served": (call(), None),
    "odd heads": (call((1, 2, 1, 3, 5, 13, 7)), None),
    "float32": (call(dtype=torch.float32), "its kernels take bfloat16 and float16, not float32"),
    "no width": (call((1, 2, 1, 3, 5, 0, 64)), "its kernels take heads of width 1 to 256, not 0"),
    "wide": (call((1, 2, 1, 3, 5, 264, 64)), "its kernels take heads of width 0 to 256, not 264"),
    "wide values": (call((1, 2, 1, 3, 5, 64, 257)), "its kernels take heads of width 0 to 256, not 257"),
    "long": (call((1, 1, 1, 1, 2**28 + 1, 1, 1)), "its kernels take up to 2^28 queries and keys, not 268435457"),
    "a mask far apart": (
        call(mask=torch.empty(1, 1, 1, 1, device="meta").as_strided((1, 1, 3, 5), (0, 0, 2**23, 1))),
        "its kernels take rows fewer than 2^23 elements apart, not 8388608",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "reason"), CALLS.values(), ids=CALLS)
def test_reasons(arguments, reason, monkeypatch):
    assert "not on a GPU" in triton_int8_launch.TRITON_INT8.unsupported(*arguments)
    monkeypatch.setattr(triton_int8_launch, "unsupported", lambda x: None)
    assert triton_int8_launch.TRITON_INT8.unsupported(*arguments) == reason


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", NAMES)
def test_on_the_gpu(name, dtype):
    from llmkern.verify import verify

    for shape in ((2, 4, 2, 300, 1517, 64, 64), (2, 4, 4, 130, 129, 128, 128), (2, 2, 1, 67, 40, 17, 23)):
        inputs = [t.cuda() for t in shifted(tensors(shape, dtype))]
        rules = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in rules_of(name, shape, dtype).items()}
        with backend.use("triton"):
            functions = (attend(plain) for plain in (False, True))
            verify(*functions, inputs, rules, gradients=False, truth=attend(exact=True)).raise_if_failed()
