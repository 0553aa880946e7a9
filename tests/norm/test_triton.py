"""The Triton kernels of this family: run by the interpreter, and compiled for AMD."""

from __future__ import annotations

import re

import pytest
import torch

from llmkern.norm import triton_launch
from tests.amd import gfx942
from tests.emulation.triton_interpreter import run_tests

pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux)")


def test_in_the_interpreter():
    report = run_tests("tests/norm/interpreted_triton.py")
    assert re.search(r"\d{2,} passed", report.strip().splitlines()[-1]), report


@pytest.mark.parametrize("centred", [False, True])
def test_for_amd(centred):
    for launch in triton_launch.examples(torch.bfloat16, 4096, centred):
        assert "buffer_load_dwordx4" in gfx942(launch) or "global_load_dwordx4" in gfx942(launch)
