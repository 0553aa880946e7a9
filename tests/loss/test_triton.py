"""The Triton kernels of this family: run by the interpreter, and compiled for AMD."""

from __future__ import annotations

import re

import pytest
import torch

from llmkern.loss import triton_launch
from tests.amd import gfx942
from tests.emulation.triton_interpreter import run_tests

pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux)")


def test_in_the_interpreter():
    report = run_tests("tests/loss/interpreted_triton.py")
    assert re.search(r"\d{2,} passed", report.strip().splitlines()[-1]), report


def test_for_amd():
    for _, launch in triton_launch.examples(torch.bfloat16, 128256):
        code = gfx942(launch)
        assert "buffer_load_dwordx4" in code or "global_load_dwordx4" in code
