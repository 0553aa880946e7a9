"""Triton's attention of sequences end to end: run by the interpreter, compiled for AMD, and what a call needs.

tests/emulation/test_ptx_attention_triton_varlen.py executes what the compiler makes of it.
"""

from __future__ import annotations

import re

import pytest
import torch

from llmkern import backend
from llmkern.attention import op, triton_varlen_launch
from llmkern.attention.mask import Mask
from llmkern.attention.triton_varlen_launch import TRITON_VARLEN, TRITON_VARLEN_BACKWARD
from llmkern.verify import verify
from tests.amd import gfx942
from tests.attention.varlen_cases import RULES, attend, packed, rule, same_bits_as_alone
from tests.emulation.triton_interpreter import run_tests


def test_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux)")
    report = run_tests("tests/attention/interpreted_triton_varlen.py")
    assert re.search(r"\d{2,} passed", report.strip().splitlines()[-1]), report


@pytest.mark.parametrize("width", [64, 128])
def test_compiled_for_amd(width):
    """No spills, and matrix instructions; waves of 64."""
    for launch in triton_varlen_launch.examples("gfx942", torch.bfloat16, width):
        assert "v_mfma_f32" in gfx942(launch)


def arguments(tokens=5, heads=2, width=64, sequences=2, device="meta", **rules):
    x = torch.empty(1, device=device).expand(tokens, heads, width)
    ends = torch.empty(1, dtype=torch.int32, device=device).expand(sequences + 1)
    return x, x, x, ends, ends, None, None, *Mask(**rules).arguments()[2:], 0.125


def backwards(query, key, value, *rest):
    return query, None, query, key, value, query, None, *rest


def test_why_it_cannot_serve_here():
    for reason in (
        TRITON_VARLEN.unsupported(*arguments(device="cpu")),
        TRITON_VARLEN_BACKWARD.unsupported(*backwards(*arguments(device="cpu"))),
    ):
        assert reason == "the tensors are on cpu, not on a GPU"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, None),
        ({"tokens": 0, "sequences": 0}, None),
        ({"width": 288}, "width 0 to 256, not 288"),
        ({"tokens": 2**28 + 1, "width": 1}, "up to 2^28 queries and keys"),
        ({"tokens": 5, "sequences": 0}, "there are tokens but no sequences"),
        ({"tokens": 5, "heads": 2**11, "sequences": 2**20}, "fewer than 2^31 tiles of 16 rows"),
    ],
)
def test_what_it_cannot_serve_anywhere(options, words, monkeypatch):
    monkeypatch.setattr(triton_varlen_launch, "unsupported", lambda x: None)
    for reason in (
        TRITON_VARLEN.unsupported(*arguments(**options)),
        TRITON_VARLEN_BACKWARD.unsupported(*backwards(*arguments(**options))),
    ):
        assert reason is None if words is None else words in reason


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", RULES)
def test_on_the_gpu(name, dtype):
    tensors, bounds = packed(([300, 0, 67, 1, 130], [517, 4, 0, 40, 129]), dtype, (4, 2), (64, 64))
    mask = rule(name, 4, 5, dtype)
    on = [t.cuda() for t in bounds]
    described = Mask(*(t.cuda() if isinstance(t, torch.Tensor) and t.dim() else t for t in mask.arguments()))
    with backend.use("triton"):
        functions = (attend(on, described, plain) for plain in (False, True))
        verify(*functions, [t.cuda() for t in tensors]).raise_if_failed()
        if name == "causal":
            same_bits_as_alone([t.cuda() for t in tensors], on, described)
    assert callable(op.attention_varlen)
