"""wgmma: descriptors, swizzles, fragments, and its waits and fences. PTX ISA 9.7.15."""

from __future__ import annotations

import numpy as np
import pytest

from tests.emulation.ptx.launch import empty
from tests.emulation.snippets import execute, kinds
from tests.emulation.test_ptx_matrix import random_bits

SPAN = {"none": 0, "128": 128, "64": 64, "32": 32}
MODE = {0: 0, 128: 1, 64: 2, 32: 3}
FILL = "ld.global.v4.b32 {%v0, %v1, %v2, %v3}, [%from]; st.shared.v4.b32 [%at], {%v0, %v1, %v2, %v3};"


def image_of(x: np.ndarray, span: int, across: bool) -> tuple[np.ndarray, int, int]:
    """Shared memory that holds x (rows, k), with the leading and the stride offset in bytes for its descriptor.

    Written from the pictures of the canonical layouts: a core matrix has 8 rows of 16 bytes; with a swizzle 8 rows of
    `span` bytes form an atom, in which 16-byte chunk c of row r lies at c xor r / (128 / span).
    """
    size = x.itemsize
    lines = x.T if across else x  # what is contiguous goes along a line
    count, length = lines.shape
    wide = max(span, 16)
    per = wide // size
    atoms = [(i, j) for j in range(-(-length // per)) for i in range(-(-count // 8))]
    atom_bytes = 8 * wide
    memory = np.full(len(atoms) * atom_bytes, 0xEE, np.uint8)
    for n, (i, j) in enumerate(atoms):
        for r in range(8):
            for c in range(wide // 16):
                chunk = np.ascontiguousarray(
                    lines[8 * i + r, j * per + c * 16 // size : j * per + (c + 1) * 16 // size]
                )
                raw = chunk.view(np.uint8)
                where = c ^ (r // (128 // span)) if span else c
                begin = n * atom_bytes + r * wide + where * 16
                memory[begin : begin + len(raw)] = raw
    next_8_lines, next_span = atom_bytes, -(-count // 8) * atom_bytes
    if span == 0 and across:  # leading: along k, which is across the lines; stride: along the lines
        return memory, next_8_lines, next_span
    if span == 0:
        return memory, next_span, next_8_lines
    return (memory, next_span, next_8_lines) if across else (memory, 0, next_8_lines)


def descriptor(at: int, leading: int, stride: int, span: int) -> int:
    return at >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | MODE[span] << 62


def run_wgmma(n, k, td, ta, tb, a_image, a_descriptor, b_image, b_descriptor, start, tail, a_registers=None, **change):
    """One wgmma on images in shared memory at 0 and 16384; returns the registers of the 128 threads."""
    count = n // (4 if td == "f16" else 2)
    out = empty((128, count), np.uint32)
    image = np.zeros(32768, np.uint8)
    image[: len(a_image)] = a_image
    image[16384 : 16384 + len(b_image)] = b_image
    names = ", ".join(f"%d{i}" for i in range(count))
    loads = "".join(f"ld.global.b32 %d{i}, [%q+{4 * i}];" for i in range(count))
    stores = "".join(f"st.global.b32 [%q+{4 * i}], %d{i};" for i in range(count))
    registers = "" if a_registers is None else "".join(f"ld.global.b32 %x{i}, [%qa+{4 * i}];" for i in range(4))
    operand = "%da" if a_registers is None else "{%x0, %x1, %x2, %x3}"
    body = f"""
    .reg .b32 %d<{count}>, %x<4>, %v<4>, %at; .reg .b64 %q, %qa, %da, %db, %from; .reg .pred %p;
    mad.wide.u32 %q, %t, {4 * count}, %a1; {loads} mad.wide.u32 %qa, %t, 16, %a3; {registers}
    shl.b32 %at, %t, 4; mul.wide.u32 %from, %t, 16; add.u64 %from, %from, %a2;
    again: {change.get("fill", FILL)}
    add.u32 %at, %at, 2048; add.u64 %from, %from, 2048; setp.lt.u32 %p, %at, 32768; @%p bra again;
    cp.async.wait_all; {change.get("fence", "fence.proxy.async.shared::cta;")} bar.sync 0;
    mov.b64 %da, {a_descriptor}; mov.b64 %db, {b_descriptor};
    {change.get("wgmma_fence", "wgmma.fence.sync.aligned;")}
    wgmma.mma_async.sync.aligned.m64n{n}k{k}.{td}.{ta}.{tb} {{{names}}}, {operand}, %db, {tail};
    wgmma.commit_group.sync.aligned; {change.get("wait", "wgmma.wait_group.sync.aligned 0;")}
    mad.wide.u32 %q, %t, {4 * count}, %a0; {stores} ret;
    """
    outside = ".extern .shared .align 1024 .b8 dynamic[];"
    body = ".reg .b32 %dyn; mov.u32 %dyn, dynamic;" + body
    extra = a_registers if a_registers is not None else np.zeros((128, 4), np.uint32)
    report = execute(body, [out, start, image, extra], 128, outside=outside, shared_bytes=32768)
    return out.data, report


def place(t: int, i: int) -> tuple[int, int]:
    """Row and column of element i of thread t of D (PTX ISA, figure of the D fragment of wgmma)."""
    return 16 * (t // 32) + t % 32 // 4 + (8 if i % 4 >= 2 else 0), 8 * (i // 4) + t % 4 * 2 + i % 2


def check(out, start, expected, td, exactly=False):
    dtype = {"f32": np.float32, "f16": np.float16, "s32": np.int32}[td]
    got, before = out.view(dtype), start.view(dtype)
    for t in range(128):
        for i in range(got.shape[1]):
            wanted = expected[place(t, i)] + float(before[t, i])
            assert abs(float(got[t, i]) - wanted) <= (
                0 if exactly else abs(wanted) * 2e-3 + 1e-2 * (td == "f16") + 1e-5
            )


def starting(td, n, rng):
    if td == "s32":
        return rng.integers(-99, 99, (128, n // 2)).astype(np.int32).view(np.uint32)
    if td == "f32":
        return rng.standard_normal((128, n // 2)).astype(np.float32).view(np.uint32)
    return rng.standard_normal((128, n // 2)).astype(np.float16).view(np.uint32)


CASES = [
    (ta, tb, td, n, span, a_across, b_across)
    for ta, tb, td, n in (("f16", "f16", "f32", 64), ("bf16", "bf16", "f32", 128), ("f16", "f16", "f16", 32))
    for span, a_across, b_across in (
        ("none", 0, 0), ("none", 1, 1), ("128", 0, 0), ("128", 1, 0), ("64", 0, 1), ("32", 1, 1),
    )
    if span in ("none", "32", "64") or n >= 64 or not b_across
] + [(ta, tb, td, 32, span, 0, 0) for ta, tb, td in (
    ("tf32", "tf32", "f32"), ("s8", "s8", "s32"), ("u8", "s8", "s32"), ("e4m3", "e5m2", "f32"),
) for span in ("none", "128", "32")]  # fmt: skip


@pytest.mark.parametrize("ta,tb,td,n,span,a_across,b_across", CASES)
def test_layouts(ta, tb, td, n, span, a_across, b_across):
    rng = np.random.default_rng(0)
    size = {"f16": 2, "bf16": 2, "tf32": 4}.get(ta, 1)
    k, wide = 32 // size, SPAN[span]
    (a_bits, a), (b_bits, b) = random_bits(ta, (64, k), rng), random_bits(tb, (n, k), rng)
    wide_a, wide_b = (
        np.zeros((64, max(k, wide // size)), a_bits.dtype),
        np.zeros((n, max(k, wide // size)), b_bits.dtype),
    )
    wide_a[:, :k], wide_b[:, :k] = a_bits, b_bits
    a_image, a_leading, a_stride = image_of(a_bits if a_across else wide_a, wide, bool(a_across))
    b_image, b_leading, b_stride = image_of(b_bits if b_across else wide_b, wide, bool(b_across))
    start = starting(td, n, rng)
    tail = "1" if td == "s32" else "1, 1, 1" + (f", {a_across}, {b_across}" if size == 2 else "")
    out, report = run_wgmma(
        n, k, td, ta, tb, a_image, descriptor(0, a_leading, a_stride, wide), b_image,
        descriptor(16384, b_leading, b_stride, wide), start, tail,
    )  # fmt: skip
    report.raise_if_faulty()
    check(out, start, a @ b.T, td, td == "s32")


def plain_case(**change):
    rng = np.random.default_rng(1)
    (a_bits, a), (b_bits, b) = random_bits("f16", (64, 16), rng), random_bits("f16", (32, 16), rng)
    (a_image, *a_offsets), (b_image, *b_offsets) = image_of(a_bits, 0, False), image_of(b_bits, 0, False)
    start = starting("f32", 32, rng)
    tail = change.pop("tail", "1, 1, 1, 0, 0")
    registers = change.pop("registers", None)
    if registers:
        cells = [[(16 * (t // 32) + t % 32 // 4 + 8 * (i // 2 % 2), t % 4 * 2 + i % 2 + 8 * (i // 4)) for i in range(8)] for t in range(128)]  # fmt: skip  # noqa: E501
        registers = np.array([[a_bits[c] for c in row] for row in cells]).view(np.uint32)
        tail = "1, 1, 1, 0"
    out, report = run_wgmma(
        32, 16, "f32", "f16", "f16", a_image, descriptor(0, *a_offsets, 0), b_image, descriptor(16384, *b_offsets, 0),
        start, tail, a_registers=registers, **change,
    )  # fmt: skip
    return out, report, start, a @ b.T


def test_a_from_registers():
    out, report, start, expected = plain_case(registers=True)
    report.raise_if_faulty()
    check(out, start, expected, "f32")


def test_scales():
    out, report, start, expected = plain_case(tail="0, 1, 1, 0, 0")  # scale-d 0: the sum begins anew
    report.raise_if_faulty()
    check(out, start * 0, expected, "f32")
    out, report, start, expected = plain_case(tail="1, -1, 1, 0, 0")
    check(out, start, -expected, "f32")
    out, report, start, expected = plain_case(tail="1, -1, -1, 0, 0")
    check(out, start, expected, "f32")


def test_what_is_missing_is_found():
    assert plain_case()[1].faults == []
    assert kinds(plain_case(wait="")[1]) == {"missing wait"}
    assert kinds(plain_case(wait="wgmma.wait_group.sync.aligned 1;")[1]) == {"missing wait"}
    assert kinds(plain_case(fence="")[1]) == {"missing fence"}
    copy = "cp.async.cg.shared.global [%at], [%from], 16;"
    assert plain_case(fill=copy)[1].faults == []
    assert kinds(plain_case(fill=copy, fence="")[1]) == {"missing fence"}
    assert kinds(plain_case(wgmma_fence="")[1]) == {"missing fence"}


@pytest.mark.parametrize("write", ["mov.b32 %d3, 0;", "mov.u32 %d3, %tid.x;", "xor.b32 %d3, %d3, %d3;",
                                   "mov.b32 %d3, {%half, %half};"])  # fmt: skip
def test_registers_that_are_written_behind_the_fence_or_in_flight(write):
    """Also by a mov of a number: that writes a register, where a mov of a register renames one."""
    write = f".reg .b16 %half; mov.b16 %half, 1; {write}"
    assert plain_case(wgmma_fence=f"{write} wgmma.fence.sync.aligned;")[1].faults == []
    assert kinds(plain_case(wgmma_fence=f"wgmma.fence.sync.aligned; {write}")[1]) == {"missing fence"}
    assert kinds(plain_case(wait=f"{write} wgmma.wait_group.sync.aligned 0;")[1]) == {"missing wait"}


def test_registers_that_are_renamed():
    """A mov takes what wgmma does with a register along to its new name, of the threads that execute it."""
    take = ".reg .b32 %y, %z; mov.b32 %y, %d3;"
    wait = "wgmma.wait_group.sync.aligned 0;"
    back = "mov.b32 %d3, %y;"
    assert plain_case(wait=f"{take} {wait} {back}")[1].faults == []
    assert kinds(plain_case(wait=f"{take} add.u32 %z, %y, 1; {wait}")[1]) == {"missing wait"}
    assert plain_case(wait=f"{take} mov.b32 %y, %t; add.u32 %z, %y, 1; {wait}")[1].faults == []  # a name of its own now
    some = ".reg .pred %e; setp.lt.u32 %e, %t, 128; @%e mov.b32 %y, %d3;"
    assert kinds(plain_case(wait=f".reg .b32 %y, %z; {some} add.u32 %z, %y, 1; {wait}")[1]) == {"missing wait"}
    some = some.replace("128", "5").replace("%y, %d3", "%y, %t")
    assert kinds(plain_case(wait=f"{take} {some} add.u32 %z, %y, 1; {wait}")[1]) == {"missing wait"}
    behind = "wgmma.fence.sync.aligned; .reg .b32 %y; add.u32 %y, %t, 1; mov.b32 %d3, %y;"
    assert kinds(plain_case(wgmma_fence=behind)[1]) == {"missing fence"}


def test_operands_outside_of_shared_memory_are_found():
    rng = np.random.default_rng(0)
    (a_bits, _), start = random_bits("f16", (64, 16), rng), starting("f32", 32, rng)
    a_image, *offsets = image_of(a_bits, 0, False)
    arguments = (
        a_image,
        descriptor(0, *offsets, 0),
        a_image,
        descriptor(32768 - 512, *offsets, 0),
        start,
        "1, 1, 1, 0, 0",
    )
    report = run_wgmma(32, 16, "f32", "f16", "f16", *arguments)[1]
    assert "out of bounds" in kinds(report)


def test_a_matrix_that_nobody_wrote_is_found():
    fill = FILL.replace("st.shared", "@%full st.shared")
    assert "uninitialised" in kinds(plain_case(fill=f".reg .pred %full; setp.ne.u32 %full, %t, 5; {fill}")[1])


def test_threads_name_the_same_matrix():
    differs = "wgmma.fence.sync.aligned; .reg .pred %e; setp.eq.u32 %e, %t, 70; @%e add.u64 %da, %da, 1;"
    assert kinds(plain_case(wgmma_fence=differs)[1]) == {"collective"}
