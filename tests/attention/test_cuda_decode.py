"""The CUDA backend of the attention on a cache: why it cannot serve a call, how it cuts the work, what it compiles to.

What its kernels compute: tests/emulation/test_ptx_decode.py and test_ptx_cache.py.
"""

from __future__ import annotations

import re
import subprocess

import pytest
import torch

from llmkern import backend, extension
from llmkern.attention import cuda_decode
from tests.attention.decode_cases import on_the_gpu
from tests.emulation import compilers


def call(dtype=torch.float16, width=64, value_width=64, tokens=32, table=None):
    shapes = (1, 1, 2, width), (1, tokens, 1, width), (1, tokens, 1, value_width)
    tensors = [torch.empty(s, dtype=dtype, device="meta") for s in shapes]
    return *tensors, None, None, None, None, None, table, *(None,) * 4, -1, -1, 0.0, 0.125, True


CALLS = {
    "served": (call(), None),
    "odd heads": (call(width=13, value_width=7), None),
    "float32": (call(torch.float32), "its kernels compute bfloat16 and float16, not float32"),
    "wide": (call(width=264), "its kernels take heads of width 1 to 256, not 264"),
    "wide values": (call(value_width=512), "its kernels take heads of width 1 to 256, not 512"),
    "long": (call(tokens=2**30), "its kernels take caches of fewer than 2^30 tokens, not of 1073741824"),
}


@pytest.mark.parametrize(("arguments", "reason"), CALLS.values(), ids=CALLS)
def test_reasons(arguments, reason, monkeypatch):
    monkeypatch.setattr("llmkern.cuda.unsupported", lambda x: None)
    assert cuda_decode.CUDA_KVCACHE.unsupported(*arguments) == reason


def test_more_blocks_than_a_grid_has(monkeypatch):
    monkeypatch.setattr("llmkern.cuda.unsupported", lambda x: None)
    for batch, heads, words in ((2**31 - 1, 16, None), (2**31, 1, "not 2147483648"), (2**30, 17, "not 2147483648")):
        query, cache = (torch.empty(batch, 1, h, 64, dtype=torch.float16, device="meta") for h in (heads, 1))
        reason = cuda_decode.CUDA_KVCACHE.unsupported(query, cache, cache, *call()[3:])
        assert reason == (words and f"its kernels take up to 2^31 - 1 blocks of 16 rows, {words}")


def test_caches_with_gaps_between_elements(monkeypatch):
    monkeypatch.setattr("llmkern.cuda.unsupported", lambda x: None)
    query, k_cache, v_cache, *rest = call()
    for caches in ((k_cache.expand(1, 32, 2, 64)[..., ::2], v_cache), (k_cache, v_cache.transpose(1, 3))):
        reason = cuda_decode.CUDA_KVCACHE.unsupported(query, *caches, *rest)
        assert reason == "its kernels write into caches whose last dimension is contiguous alone"


def test_why_it_cannot_serve_here():
    reason = cuda_decode.CUDA_KVCACHE.unsupported(torch.zeros(1, 1, 1, 8), *call()[1:])
    expected = "no CUDA part" if not extension.MISSING and not extension._C.cuda_architectures else "CUDA|cpu|library"
    assert re.search(expected, reason)


def test_it_is_the_first_on_cuda():
    listed = backend.Operator.all["attention_kvcache"].by_device["cuda"]
    assert [b.name for b in listed] == ["cuda", "triton", "reference"]


def test_pieces():
    """As many as fill the device, none of which is short."""
    assert cuda_decode.pieces(1, 10, 132) == 1
    assert cuda_decode.pieces(1, 4096, 132) == 16
    assert cuda_decode.pieces(8, 2**17, 132) == 66
    assert cuda_decode.pieces(1, 2**20, 132) == 128
    assert cuda_decode.pieces(4096, 2**20, 132) == 1
    assert cuda_decode.pieces(0, 2**20, 132) == 128


#: Registers and bytes spilled by parts of the kernels' names: of blocks of 128 threads, 65536 registers hold 3 or 2.
ALLOWED = {
    "S2_Li64ELb1": (168, 0), "aLi128ELb1": (168, 0), "S2_Li128ELb1": (255, 0),
    "aLi256E": (255, 0), "S2_Li256E": (255, 0), "join_pieces": (48, 0), "cache_kernel": (56, 0),
}  # fmt: skip


@pytest.mark.skipif(compilers.NVCC is None, reason=compilers.NO_NVCC)
def test_compiled_by_nvcc(tmp_path):
    """Registers for the blocks that a processor is to hold, and no spills."""
    for name, kernels in (("cuda_decode", 16), ("cuda_cache", 4)):
        source = tmp_path / f"{name}.ptx"
        source.write_text(compilers.nvcc(compilers.ROOT / f"csrc/attention/{name}.cu", "80", ()))
        command = ["ptxas", "-v", "-arch=sm_80", str(source), "-o", str(tmp_path / "cubin")]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        found = re.findall(
            r"function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", told, re.DOTALL
        )  # fmt: skip
        assert len(found) == kernels, told
        for kernel, spilled, registers in found:
            allowed, spills = next(x for part, x in ALLOWED.items() if part in kernel)
            assert int(registers) <= allowed and int(spilled) <= spills, (kernel, registers, spilled)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [40, 3000])
def test_on_the_gpu(tokens, dtype):
    out, expected, caches, others = on_the_gpu("cuda", tokens, dtype)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(caches, others)
