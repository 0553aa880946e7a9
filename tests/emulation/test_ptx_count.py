"""What is counted: sectors, bank conflicts, instructions; against counts made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tests.emulation import compilers
from tests.emulation.ptx.launch import empty, run
from tests.emulation.snippets import execute


def counted(body: str, arguments=(), threads: int = 32, blocks: int = 1):
    report = execute(body, list(arguments), threads, blocks, counts=True)
    return report.raise_if_faulty().counts


@pytest.mark.parametrize("size,stride,sectors,fewest", [
    (4, 4, 4, 4), (4, 8, 8, 4), (4, 32, 32, 4), (4, 0, 1, 1), (16, 16, 16, 16), (16, 32, 32, 16), (8, 8, 8, 8),
    (2, 2, 2, 2), (1, 1, 1, 1),
])  # fmt: skip
def test_sectors(size, stride, sectors, fewest):
    """A warp reads `size` bytes at every `stride`."""
    x, vector = np.zeros(2048, np.uint8), {16: "v4.b32", 8: "v2.b32", 4: "b32", 2: "u16", 1: "u8"}[size]
    registers = {16: "{%v0, %v1, %v2, %v3}", 8: "{%v0, %v1}"}.get(size, "%v0")
    body = (
        f".reg .b32 %v<4>; .reg .b64 %q; mad.wide.u32 %q, %t, {stride}, %a0; ld.global.{vector} {registers}, [%q]; ret;"
    )
    if size == 2:
        body = body.replace(".b32 %v<4>", ".b16 %v<4>")
    counts = counted(body, [x])
    assert counts.sectors == [sectors, 0] and counts.fewest == [fewest, 0]
    assert counts.touched == [sectors, 0]


def test_sectors_of_parts_of_warps_and_blocks():
    """Two blocks of 40 threads: requests of 32 and 8 threads, and each block's at an offset of 4 bytes."""
    x = np.zeros(2048, np.uint8)
    body = """
    .reg .b32 %v, %k; .reg .b64 %q; mad.lo.u32 %k, %b, 40, %t; mad.wide.u32 %q, %k, 4, %a0; mov.u32 %v, 1;
    st.global.b32 [%q+4], %v; ret;
    """
    counts = counted(body, [x], 40, 2)
    # Block 0: bytes 4 to 131 (sectors 0-4), 132 to 163 (4, 5). Block 1: 164 to 291 (5-9), 292 to 323 (9, 10).
    assert counts.sectors == [0, 5 + 2 + 5 + 2] and counts.fewest == [0, 4 + 1 + 4 + 1]
    assert counts.touched == [0, 11]


def banks(words: list[int]) -> int:
    """Wavefronts of one phase: the most different words in a bank."""
    return max(len({w for w in words if w % 32 == bank}) for bank in range(32))


@pytest.mark.parametrize("size,stride", [(4, 4), (4, 8), (4, 128), (4, 132), (4, 0), (8, 8), (8, 16), (16, 16), (16, 32), (16, 128)])  # fmt: skip  # noqa: E501
def test_bank_conflicts(size, stride):
    vector, registers = {16: ("v4.b32", "{%v, %v, %v, %v}"), 8: ("v2.b32", "{%v, %v}"), 4: ("b32", "%v")}[size]
    body = f"""
    .shared .align 16 .b8 s[4352]; .reg .b32 %v, %at; mov.u32 %v, 0; mov.u32 %at, s; mad.lo.u32 %at, %t, {stride}, %at;
    st.shared.{vector} [%at], {registers}; ret;
    """
    counts = counted(body)
    lanes, words = 32 * 4 // max(size, 4), size // 4
    phases = [[t * stride // 4 + w for t in range(p, p + lanes) for w in range(words)] for p in range(0, 32, lanes)]
    expected = sum(map(banks, phases))
    least = sum(-(-len(set(phase)) // 32) for phase in phases)
    assert (counts.wavefronts, counts.conflicts) == (expected, expected - least)


def test_instructions_and_sites():
    x = np.zeros(64, np.float32)
    body = """
    .reg .f32 %x; .reg .b64 %q; mad.wide.u32 %q, %t, 4, %a0; ld.global.f32 %x, [%q]; ex2.approx.f32 %x, %x;
    fma.rn.f32 %x, %x, %x, %x; cvt.rni.f32.f32 %x, %x; st.global.f32 [%q], %x; bar.sync 0; ret;
    """
    counts = counted(body, [x], 64)
    assert {k: counts.issued[k] for k in ("special", "multiply-add", "conversion")} == {
        "special": 2, "multiply-add": 2, "conversion": 4,  # one of them is of execute's own
    }  # fmt: skip
    assert counts.issued["control"] == 4
    load = next(s for s in counts.sites if not s.writes)
    assert (load.requests, load.bytes, load.units, load.space) == (2, 256, 8, "global")
    assert "ld.global.f32" in load.text


@pytest.mark.skipif(compilers.NVCC is None, reason=compilers.NO_NVCC)
def test_a_product():
    """Tiles without bank conflicts; half the multiplications of 64 x 128 x 128 are those of a 16 x 8 x 16 times 512."""
    a, b = np.zeros((64, 128), np.uint16), np.zeros((128, 128), np.uint16)
    c = empty((64, 128), np.float32)
    ptx = compilers.nvcc(compilers.KERNELS / "gemm_mma.cu", "80")
    report = run(ptx, "gemm_bf16", (2, 1), 128, [a, b, c, 64, 128, 128], counts=True).raise_if_faulty()
    counts = report.counts
    assert counts.conflicts == 0
    assert counts.matrix == {"mma.m16n8k16.f32.bf16.bf16.f32": (64 // 16) * (128 // 8) * (128 // 16)}
    assert counts.touched == [(64 + 128) * 256 // 32, 64 * 128 * 4 // 32]
    # a is read by both blocks, b by one each.
    assert counts.sectors[0] == counts.fewest[0] == (2 * 64 + 128) * 256 // 32
    assert sum(counts.issued.values()) == report.issued
