"""Triton's attention weights and column sums: run by the interpreter, compiled for AMD, and what a call needs.

tests/emulation/test_ptx_attention_triton_weights.py executes what the compiler makes of them.
"""

from __future__ import annotations

import re

import pytest
import torch

from llmkern import backend
from llmkern.attention import triton_weights_launch
from llmkern.attention.mask import Mask
from llmkern.attention.triton_weights_launch import TRITON_COLUMN_SUMS, TRITON_WEIGHTS
from llmkern.verify import verify
from tests.amd import gfx942
from tests.attention.cases import FEATURES, RULES, rule, tensors
from tests.attention.weights_cases import column_sums, weights
from tests.emulation.triton_interpreter import run_tests


def test_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux)")
    report = run_tests("tests/attention/interpreted_triton_weights.py")
    assert re.search(r"\d{2,} passed", report.strip().splitlines()[-1]), report


@pytest.mark.parametrize("width", [64, 128])
def test_compiled_for_amd(width):
    """No spills, and matrix instructions; waves of 64."""
    for launch in triton_weights_launch.examples("gfx942", torch.bfloat16, width):
        assert "v_mfma_f32" in gfx942(launch)


def arguments(shape=(1, 2, 3, 64), keys=5, device="meta"):
    q = torch.empty(1, device=device).expand(shape)
    k = torch.empty(1, device=device).expand(*shape[:2], keys, shape[3])
    return q, k, torch.empty(1, device=device).expand(shape[:3]), *Mask().arguments(), 0.125, False


@pytest.mark.parametrize("served", [TRITON_WEIGHTS, TRITON_COLUMN_SUMS], ids=["weights", "column sums"])
def test_what_it_cannot_serve(served, monkeypatch):
    assert served.unsupported(*arguments(device="cpu")) == "the tensors are on cpu, not on a GPU"
    monkeypatch.setattr(triton_weights_launch, "unsupported", lambda x: None)
    assert served.unsupported(*arguments()) is None
    assert "width 0 to 256, not 288" in served.unsupported(*arguments((1, 2, 3, 288)))
    many = served.unsupported(*arguments((2**14, 2**14, 1, 1), 2**13))
    assert "fewer than 2^31 tiles" in many


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [n for n in (*RULES, *FEATURES) if n != "dropout"])
def test_on_the_gpu(name, dtype):
    for shape in ((2, 4, 2, 300, 517, 64, 1), (2, 2, 1, 67, 40, 17, 1)):
        inputs = [t.cuda() for t in tensors(shape, dtype)[:2]]
        rules = {k: v.cuda() if isinstance(v, torch.Tensor) and k != "seed" else v
                 for k, v in rule(name, shape, dtype).items()}  # fmt: skip
        with backend.use("triton"):
            for of in (weights, column_sums):
                functions = (of(plain=plain) for plain in (False, True))
                verify(*functions, inputs, rules, gradients=False).raise_if_failed()
