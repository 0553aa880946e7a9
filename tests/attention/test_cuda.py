"""The attention CUDA kernels: compiled by nvcc for real targets, why they cannot serve, and on a GPU where one is.

tests/emulation/test_ptx_attention.py executes them.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from llmkern import backend, extension
from llmkern.attention import cuda, op, reference
from llmkern.attention.mask import Mask
from llmkern.verify import verify
from tests.attention.cases import FEATURES, RULES, attend, rule, tensors

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc")


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc to compile with")
@pytest.mark.parametrize("architecture", ["80", "90"])
def test_compiled_by_nvcc(architecture, tmp_path):
    """No spills, and two blocks of 128 threads have room for their registers."""
    ptx = tmp_path / "cuda.ptx"
    source, flags = str(ROOT / "csrc/attention/cuda_forward.cu"), [f"-arch=sm_{architecture}", "-std=c++17", "-O3"]
    subprocess.run([NVCC, *flags, "-ptx", source, "-o", str(ptx)], check=True)
    assembled = ["ptxas", "-v", f"-arch=sm_{architecture}", str(ptx), "-o", str(tmp_path / "cuda.cubin")]
    told = subprocess.run(assembled, capture_output=True, text=True, check=True).stderr
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", told)]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", told)]
    assert len(registers) == 12 and spills and max(spills) == 0 and max(registers) <= 255, told
    for kernel in re.split(r"\.entry ", ptx.read_text())[1:]:
        assert kernel.count("mma.sync.aligned.m16n8k16") and kernel.count("cp.async.cg.shared.global")
        assert kernel.count("ldmatrix.sync.aligned.m8n8.x4.trans") and "st.global.v4" in kernel


def arguments(shape=(1, 2, 2, 3, 5, 64, 64), dtype=torch.bfloat16, uniform=False, **rules):
    return (*tensors(shape, dtype), *Mask(**rules).arguments(), 0.125, uniform)


def test_why_it_cannot_serve_here():
    reason = cuda.CUDA_ATTENTION.unsupported(*arguments())
    expected = "no CUDA part" if not extension._C.cuda_architectures else "CUDA|cpu"
    assert re.search(expected, reason)
    assert cuda.CUDA_ATTENTION_BACKWARD.unsupported(*arguments())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": torch.float32}, "bfloat16 and float16, not float32"),
        ({"shape": (1, 2, 2, 3, 5, 136, 64)}, "width 1 to 128, not 136"),
        ({"shape": (1, 2, 2, 3, 5, 64, 256)}, "width 1 to 128, not 256"),
        ({"dropout_p": 0.1, "uniform": True}, "drop weights of rows that attend to all keys alike"),
    ],
)
def test_what_it_cannot_serve_anywhere(options, words, monkeypatch):
    monkeypatch.setattr("llmkern.cuda.unsupported", lambda x: None)
    assert words in cuda.CUDA_ATTENTION.unsupported(*arguments(**options))
    assert cuda.CUDA_ATTENTION.unsupported(*arguments()) is None
    assert "no CUDA kernel of the gradients" in cuda.CUDA_ATTENTION_BACKWARD.unsupported(*arguments())


def test_more_blocks_than_a_grid_has(monkeypatch):
    """Are refused before the choice of the backend, so that another serves the call."""
    monkeypatch.setattr("llmkern.cuda.unsupported", lambda x: None)
    for batch, queries in ((2**29, 64), (2**30, 65), (2**31, 1)):
        q = torch.empty(batch, 2 if queries > 1 else 1, queries, 64, dtype=torch.float16, device="meta")
        reason = cuda.CUDA_ATTENTION.unsupported(q, q, q, *Mask().arguments(), 0.125, False)
        expected = q.shape[0] * q.shape[1] * -(-queries // 64)
        if expected < 2**31:
            assert reason is None
        else:
            assert reason == f"its kernels take up to 2^31 - 1 blocks of 64 queries of a head, not {expected}"


without_a_device = pytest.mark.skipif(
    extension.MISSING is not None or not extension._C.cuda_architectures or torch.cuda.is_available(),
    reason="needs the CUDA part of the library, and no GPU",
)


def what_a_launch_says(monkeypatch, **options):
    q, k, v, *rules = arguments(**options)
    launch = cuda._forward(q, k, v, *rules)
    monkeypatch.setattr("llmkern.cuda.stream", lambda device: (0, 0))
    with pytest.raises(RuntimeError) as error:
        launch(q, k, v, *rules)
    return str(error.value)


@without_a_device
def test_a_launch_without_a_device_is_an_error(monkeypatch):
    assert "attention_forward: the launch on CUDA device 0 failed" in what_a_launch_says(monkeypatch)


@without_a_device
def test_hopper_takes_wgmma_where_it_can(monkeypatch):
    """The errors of the two kernels, which name them, tell which one a call came to."""
    monkeypatch.setattr("llmkern.cuda.is_hopper", lambda device: True)
    served = {"shape": (1, 2, 1, 3, 5, 64, 64), "window_right": 0}
    there = "sm_90" in extension._C.cuda_architectures
    expected = "attention_forward_sm90: " if there else "attention_forward: "
    assert what_a_launch_says(monkeypatch, **served).startswith(expected)
    for options in ({"shape": (1, 2, 1, 3, 5, 40, 40)}, {**served, "softcap": 20.0}):
        assert what_a_launch_says(monkeypatch, **options).startswith("attention_forward: ")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*RULES, *FEATURES])
def test_on_the_gpu(name, dtype):
    for shape in ((2, 4, 2, 300, 517, 64, 64), (2, 4, 4, 130, 129, 128, 128), (2, 2, 1, 67, 40, 17, 23)):
        inputs = [t.cuda() for t in tensors(shape, dtype)]
        rules = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in rule(name, shape, dtype).items()}
        with backend.use("cuda"):
            functions = (attend(plain=plain, logsumexp=True) for plain in (False, True))
            verify(*functions, inputs, rules, gradients=False).raise_if_failed()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gradients_on_the_gpu():
    inputs = [t.cuda().requires_grad_() for t in tensors((1, 4, 2, 70, 90, 64, 64), torch.bfloat16)]
    output, _ = op.attention(*inputs, Mask(window_right=0), 0.125)
    grads = torch.autograd.grad(output.sum(), inputs)
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    truth = reference.attention(*doubles, *Mask(window_right=0).arguments(), 0.125, False)[0]
    for a, b in zip(grads, torch.autograd.grad(truth.sum(), doubles), strict=True):
        assert (a - b).abs().max() <= 2**-5 * b.abs().max()
