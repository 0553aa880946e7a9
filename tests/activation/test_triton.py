"""The Triton kernels of this family: run by the interpreter, and compiled for AMD."""

from __future__ import annotations

import re

import pytest
import torch

from llmkern import triton
from llmkern.activation import triton_launch
from tests.activation.cases import ACTIVATIONS
from tests.amd import gfx942
from tests.emulation.triton_interpreter import run_tests

pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux)")


def test_in_the_interpreter():
    report = run_tests("tests/activation/interpreted_triton.py")
    assert re.search(r"\d{2,} passed", report.strip().splitlines()[-1]), report


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_for_amd(activation):
    x, made = torch.empty(64, 4096, dtype=torch.bfloat16, device="meta"), list[triton.Launch]()
    triton_launch.gated(made.append, x, x, activation)
    triton_launch.gated_backward(made.append, x, x, x, activation)
    for launch in made:
        gfx942(launch)
