"""Triton's attention kernels: run by the interpreter, compiled for real targets, and what a call needs.

tests/emulation/test_ptx_attention_triton.py executes what the compiler makes of them; tests/test_inspect.py holds them
to their registers.
"""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

from llmkern import backend
from llmkern.attention import triton_launch, triton_varlen_launch
from llmkern.attention.mask import Mask
from llmkern.attention.triton_configurations import FAMILIES, TABLE, configuration, family
from llmkern.verify import verify
from tests.amd import gfx942
from tests.attention.cases import FEATURES, RULES, attend, rule, tensors
from tests.emulation.triton_interpreter import run_tests


def test_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux)")
    report = run_tests("tests/attention/interpreted_triton.py")
    assert re.search(r"\d{2,} passed", report.strip().splitlines()[-1]), report


@pytest.mark.parametrize("width", [64, 128])
def test_compiled_for_amd(width):
    """No spills, and matrix instructions; waves of 64."""
    for launch in triton_launch.examples("gfx942", torch.bfloat16, width):
        code = gfx942(launch)
        assert "v_mfma_f32" in code or launch.kernel == "attention_statistics_kernel"


def arguments(shape=(1, 2, 2, 3, 5, 64, 64), uniform=False, device="meta", **rules):
    q, k, v = (t.to(device) for t in tensors(shape))
    return q, k, v, *Mask(**rules).arguments(), 0.125, uniform


def test_why_it_cannot_serve_here():
    assert (
        triton_launch.TRITON_ATTENTION.unsupported(*arguments(device="cpu")) == "the tensors are on cpu, not on a GPU"
    )
    q, k, v, *rules = arguments(device="cpu")
    reason = triton_launch.TRITON_ATTENTION_BACKWARD.unsupported(q, None, q, k, v, q, None, *rules, False)
    assert reason == "the tensors are on cpu, not on a GPU"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shape": (1, 2, 2, 3, 5, 288, 64)}, "width 0 to 256, not 288"),
        ({"shape": (1, 2, 2, 3, 5, 64, 257)}, "width 0 to 256, not 257"),
        ({"dropout_p": 0.1, "uniform": True}, "drop weights of rows that attend to all keys alike"),
        ({"shape": (1, 1, 1, 2**28 + 1, 1, 1, 1)}, "up to 2^28 queries and keys"),
        ({"dense": torch.empty(1, 1, 1, 1, device="meta").as_strided((1, 1, 3, 5), (0, 0, 2**23, 1))}, "2^23 elements"),
        ({"shape": (2**20, 2**11, 1, 1, 1, 1, 1)}, "fewer than 2^31 tiles"),
    ],
)
def test_what_it_cannot_serve_anywhere(options, words, monkeypatch):
    monkeypatch.setattr(triton_launch, "unsupported", lambda x: None)
    monkeypatch.setattr(sys.modules[__name__], "tensors", lambda shape: [
        torch.empty(1, device="meta").expand(s) for s in
        ((shape[0], shape[1], shape[3], shape[5]), (shape[0], shape[2], shape[4], shape[5]),
         (shape[0], shape[2], shape[4], shape[6]))
    ])  # fmt: skip
    assert words in (triton_launch.TRITON_ATTENTION.unsupported(*arguments(**options)) or "")
    q, k, v, *rules = arguments(**options)
    assert words in (
        triton_launch.TRITON_ATTENTION_BACKWARD.unsupported(q, None, q, k, v, q, None, *rules, False) or ""
    )
    assert triton_launch.TRITON_ATTENTION.unsupported(*arguments()) is None


def test_every_call_has_a_configuration():
    assert {family(c) for c in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (11, 0), (12, 0), None)} == set(FAMILIES)
    for kernel in (*TABLE, "statistics"):
        for name in FAMILIES:
            for width in (16, 32, 64, 128, 256):
                for itemsize, rules in ((2, ""), (2, "mask"), (2, "more"), (4, ""), (4, "mask"), (4, "more")):
                    tile = configuration(kernel, name, itemsize, width, rules)
                    # Blocks that are made again in tiles of 16 must divide into them.
                    assert tile.queries % 16 == tile.keys % 16 == 0 and tile.warps in (4, 8), (kernel, name, width)


def test_importing_the_package_does_not_import_triton():
    code = "import llmkern, sys; import llmkern.attention.triton_launch; print('triton' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*RULES, *FEATURES])
def test_on_the_gpu(name, dtype):
    for shape in ((2, 4, 2, 300, 517, 64, 64), (2, 4, 4, 130, 129, 128, 128), (2, 2, 1, 67, 40, 17, 23)):
        inputs = [t.cuda() for t in tensors(shape, dtype)]
        rules = {k: v.cuda() if isinstance(v, torch.Tensor) and k != "seed" else v
                 for k, v in rule(name, shape, dtype).items()}  # fmt: skip
        with backend.use("triton"):
            functions = (attend(plain=plain) for plain in (False, True))
            verify(*functions, inputs, rules).raise_if_failed()


def test_gradients_whose_rows_lie_far_apart_are_refused(monkeypatch):
    """Offsets within a tile have 32 bits."""
    monkeypatch.setattr(triton_launch, "unsupported", lambda x: None)
    monkeypatch.setattr(triton_varlen_launch, "unsupported", lambda x: None)
    x = torch.empty(1, 1, 2, 16, device="meta", dtype=torch.float16)
    far = torch.empty_strided((1, 1, 2, 16), (2**24, 2**24, 2**23, 1), device="meta", dtype=torch.float16)
    sums = torch.empty(1, 1, 2, device="meta", dtype=torch.float64)
    rules = (*Mask().arguments(), 0.25, False, False)
    refused = triton_launch.TRITON_ATTENTION_BACKWARD.unsupported
    assert refused(x, None, x, x, x, x, sums, *rules) is None
    for grad, output in ((far, x), (x, far)):
        assert "2^23 elements apart, not 8388608" in (refused(grad, None, x, x, x, output, sums, *rules) or "")
    ends = torch.empty(2, device="meta", dtype=torch.int32)
    packed = (ends, ends, None, None, *Mask().arguments()[2:], 0.25)
    refused = triton_varlen_launch.TRITON_VARLEN_BACKWARD.unsupported
    x, far = (t[0].transpose(0, 1) for t in (x, far))
    assert refused(x, None, x, x, x, x, sums[0], *packed) is None
    assert "2^23 elements apart" in (refused(far, None, x, x, x, x, sums[0], *packed) or "")
