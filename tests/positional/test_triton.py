"""The Triton kernels of this family: run by the interpreter, compiled for real targets, and what the call needs."""

from __future__ import annotations

import itertools
import re
import subprocess
from pathlib import Path

import pytest
import torch

from llmkern.functional import rotary
from llmkern.positional import triton_launch
from tests.emulation.triton_interpreter import run_tests
from tests.positional.cases import ROTARY, rotary_inputs

triton = pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux)")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from llmkern.positional.triton_kernels import rotary_kernel  # noqa: E402

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
OPTIONS = triton_launch.OPTIONS
POINTERS = ("q", "k", "q_out", "k_out", "cos", "sin", "position_ids")


def test_in_the_interpreter():
    report = run_tests("tests/positional/interpreted_triton.py")
    assert re.search(r"\d{2,} passed", report.strip().splitlines()[-1]), report


def compiled(capability: int, dtype: torch.dtype, width: int, half: int, interleaved: bool):
    """The kernel as a call with 32 heads, aligned tensors and strides divisible by 16 compiles it."""
    constants = triton_launch.constants(width, half, 32, interleaved, False, False, False)
    names = rotary_kernel.arg_names
    signature = {}
    for name in names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in POINTERS:
            signature[name] = "*i64" if name == "position_ids" else "*fp32" if name in ("cos", "sin") else TYPES[dtype]
        else:
            signature[name] = "i32"
    dividing = [n for n in names if n in POINTERS or re.fullmatch(r".*_[bhs]", n)]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in dividing}
    source = ASTSource(rotary_kernel, signature, {(names.index(n),): v for n, v in constants.items()}, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=OPTIONS)


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers, stack bytes and so on, as cuobjdump tells them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    command = [str(tool), "--dump-resource-usage", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}


@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
def test_compiled_for(capability, tmp_path):
    """No spills, few enough registers for full occupancy of such a kernel, and wide accesses."""
    for dtype, interleaved in itertools.product(TYPES, (False, True)):
        kernel = compiled(capability, dtype, 128, 64, interleaved)
        used = resources(kernel.asm["cubin"], tmp_path)
        assert used["STACK"] == used["LOCAL"] == 0, (dtype, interleaved, used)
        assert used["REG"] <= 128, (dtype, interleaved, used)
        assert kernel.metadata.shared <= 16 << 10
        assert re.search(r"ld\.global\S*\.v4\.b32", kernel.asm["ptx"]), (dtype, interleaved)
        assert re.search(r"st\.global\S*\.v4\.b32", kernel.asm["ptx"]), (dtype, interleaved)


def test_heads_that_are_no_power_of_two_compile(tmp_path):
    for interleaved in (False, True):
        used = resources(compiled(90, torch.bfloat16, 80, 34, interleaved).asm["cubin"], tmp_path)
        assert used["STACK"] == used["LOCAL"] == 0


def test_why_it_cannot_serve_here():
    q, k, cos, sin = rotary_inputs(ROTARY["usual"], torch.float32)
    assert triton_launch.TRITON_ROTARY.unsupported(q, k, cos, sin) == "the tensors are on cpu, not on a GPU"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("interleaved", [False, True])
def test_on_the_gpu(interleaved):
    from llmkern import backend
    from llmkern.verify import verify

    def rotated(q, k, cos, sin):
        with backend.use("triton"):
            return rotary(q, k, cos, sin, interleaved=interleaved)

    def plain(q, k, cos, sin):
        with backend.use("reference"):
            return rotary(q, k, cos, sin, interleaved=interleaved)

    for shape, dtype in itertools.product(ROTARY.values(), (torch.float32, torch.bfloat16, torch.float16)):
        if shape[2] == 0:
            continue
        inputs = [t.cuda() for t in rotary_inputs(shape, dtype)]
        verify(rotated, plain, inputs, gradients=False).raise_if_failed()


def test_grids_that_no_gpu_takes_are_refused():
    """A batch lies along the second axis of the grid, which holds 65535 programs."""
    q = torch.empty(65536, 1, 1, 8, device="meta")
    assert "a batch of up to 65535, not 65536" in (triton_launch.rotary_limits(q) or "")
    assert triton_launch.rotary_limits(q[1:]) is None
    x = torch.empty(1, 1, 65535 * 1024 + 1, device="meta")
    assert "rows of up to 67107840 elements, not 67107841" in (triton_launch.sinusoidal_limits(x) or "")
    assert triton_launch.sinusoidal_limits(x[..., 1:]) is None
