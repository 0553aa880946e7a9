"""Faults written by hand: those that no change of a single token makes."""

from __future__ import annotations

import dataclasses

from tests.emulation.mutate.mutant import Mutant, make


@dataclasses.dataclass(frozen=True)
class Planted:
    """`before`, which stands in the file exactly once, becomes `after`. host: it is code of the launcher."""

    file: str
    before: str
    after: str
    host: bool = False


POSITIONAL, DEVICE = "csrc/positional/cuda.cu", "csrc/common/device.cuh"
LAUNCH, TRITON = "csrc/common/launch.cuh", "llmkern/positional/triton_kernels.py"

PLANTED = (
    # The launchers: which kernel, how much work.
    Planted(POSITIONAL, "aligned<float>(p.pe, p.pe_stride_s);", "true;", host=True),
    Planted(POSITIONAL, "aligned<T>(p.out, p.out_stride_s, p.out_stride_b) &&", "", host=True),
    Planted(POSITIONAL, "bool vectors = aligned<T>(p.x, p.x_stride_s, p.x_stride_b) &&", "bool vectors =", host=True),
    Planted(POSITIONAL, "reinterpret_cast<uintptr_t>(p) % 16 == 0 && ", "", host=True),
    Planted(POSITIONAL, "uintptr_t>(p) % 16 == 0", "uintptr_t>(p) % 8 == 0", host=True),
    Planted(POSITIONAL, "&& ((strides % kLanes<T> == 0) && ...)", "", host=True),
    Planted(POSITIONAL, "half % N == 0 && ", "", host=True),
    Planted(POSITIONAL, "rows(p.q, p.q_stride) && ", "", host=True),
    Planted(POSITIONAL, "rows(p.q_out, p.q_out_stride) && ", "", host=True),
    Planted(POSITIONAL, "rows(p.k, p.k_stride) &&", "", host=True),
    Planted(POSITIONAL, "rows(p.k_out, p.k_out_stride) && ", "", host=True),
    Planted(POSITIONAL, "aligned<Table>(p.cos, p.cos_stride) &&", "", host=True),
    Planted(POSITIONAL, "aligned<Table>(p.sin, p.sin_stride);", "true;", host=True),
    Planted(POSITIONAL, "aligned<T>(x, s[0], s[1], s[2])", "aligned<T>(x, s[0], s[1])", host=True),
    Planted(POSITIONAL, "bool copies = p.q != p.q_out || p.k != p.k_out;", "bool copies = p.q != p.q_out;", host=True),
    Planted(POSITIONAL, "w.rotated_groups = (half + N - 1) / N;", "w.rotated_groups = half / N;", host=True),
    Planted(POSITIONAL, "(p.width - p.rotated + N - 1) / N", "(p.width - p.rotated) / N", host=True),
    Planted(POSITIONAL, "(all_heads + w.heads - 1) / w.heads;", "all_heads / w.heads;", host=True),
    Planted(POSITIONAL, "w.items = p.batch * w.chunks", "w.items = w.chunks", host=True),
    Planted(POSITIONAL, "p.batch * ((p.width + kLanes<T> - 1)", "p.batch * ((p.width)", host=True),
    Planted(LAUNCH, "(items + kThreads - 1) / kThreads", "items / kThreads", host=True),
    Planted(LAUNCH, "if (items <= 0) return;", "if (items < 0) return;", host=True),
    # Wrong dtype, wrong half, wrong row.
    Planted(POSITIONAL, "wide ? rotary_typed<Bf16, float>", "!wide ? rotary_typed<Bf16, float>", host=True),
    Planted(POSITIONAL, "return sinusoidal_add_typed<Bf16>", "return sinusoidal_add_typed<Fp16>", host=True),
    Planted(POSITIONAL, "c2 = high0 ^ c3 ^ k1, c3 = low0;", "c2 = high0 ^ c3 ^ k0, c3 = low0;"),
    Planted(POSITIONAL, "c0 = high1 ^ c1 ^ k0, c1 = low1", "c1 = low1, c0 = high1 ^ c1 ^ k0"),
    Planted(POSITIONAL, "k0 = static_cast<uint32_t>(p.seed), k1 = static_cast<uint32_t>(p.seed >> 32);",
            "k0 = static_cast<uint32_t>(p.seed), k1 = k0;"),
    Planted(POSITIONAL, "(x + first, y, n1);\n  read<kAligned, N>(x + second, y + N, n2);",
            "(x + second, y, n1);\n  read<kAligned, N>(x + first, y + N, n2);"),
    Planted(POSITIONAL, "write<kAligned, N>(out + second, y + N, n2);", "write<kAligned, N>(out + second, y, n2);"),
    Planted(POSITIONAL, "write<kAligned, N>(out + second, y + N, n2);", "write<kAligned, N>(out + second, y + N, n1);"),
    Planted(POSITIONAL, "float a = left, b = right;", "float& a = left;\n    float b = right;"),
    Planted(POSITIONAL, "if (row >= 0 && row < p.table_length) {", "if (row < p.table_length) {"),
    Planted(POSITIONAL, "if (row >= 0 && row < p.table_length) {", "if (row >= 0) {"),
    Planted(POSITIONAL, "int64_t head = is_q ? h : h - p.heads;", "int64_t head = h;"),
    Planted(POSITIONAL, "*out_stride = is_q ? p.q_out_stride : p.k_out_stride", "*out_stride = stride"),
    Planted(POSITIONAL, "if (kAligned && left >= kLanes<T>) {", "if (kAligned) {"),
    Planted(POSITIONAL, "if (kAligned && d + kLanes<T> <= p.width)", "if (kAligned)"),
    Planted(POSITIONAL, "static_cast<const Table*>(p.sin) + row * p.sin_stride",
            "static_cast<const Table*>(p.sin) + row * p.cos_stride"),
    Planted(POSITIONAL, "at = b * p.position_stride_b + s * p.position_stride_s", "at = s * p.position_stride_s"),
    Planted(DEVICE, 'cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low)',
            'cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(low), "f"(high)'),
    Planted(DEVICE, 'cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low)',
            'cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(low), "f"(high)'),
    Planted(DEVICE, "cvt.rn.bf16x2.f32", "cvt.rz.bf16x2.f32"),
    Planted(DEVICE, "cvt.rn.f16x2.f32", "cvt.rz.f16x2.f32"),
    Planted(DEVICE, "cvt.rn.bf16.f32", "cvt.rz.bf16.f32"),
    Planted(DEVICE, "cvt.rn.f16.f32", "cvt.rz.f16.f32"),
    Planted(DEVICE, "{%1, %2, %3, %4}", "{%2, %1, %3, %4}"),
    Planted(DEVICE, "st.global.v4.b32 [%0], {%1, %2, %3, %4};", "st.global.v2.b32 [%0], {%1, %2};"),
    Planted(DEVICE, "words[4] = {x.x, x.y, x.z, x.w};", "words[4] = {x.x, x.z, x.y, x.w};"),
    Planted(DEVICE, "if ((static_cast<uint64_t>(a | b) >> 32) == 0) return", "return"),
    # Triton.
    Planted(TRITON, "s = tl.program_id(0).to(tl.int64)\n    b = tl.program_id(1).to(tl.int64)",
            "s = tl.program_id(1).to(tl.int64)\n    b = tl.program_id(0).to(tl.int64)"),
    Planted(TRITON, "known = inside & (each >= 0) & (each < table_length)", "known = inside & (each < table_length)"),
    Planted(TRITON, "known = inside & (each >= 0) & (each < table_length)", "known = inside & (each >= 0)"),
    Planted(TRITON, "block -= q_blocks", "pass"),
    Planted(TRITON, "    if INVERSE:\n        d = -d\n", ""),
    Planted(TRITON, "cos + position * cos_s", "cos + s * cos_s"),
    Planted(TRITON, "x_h, y_h = tl.cast(k_h, tl.int64), tl.cast(k_out_h, tl.int64)",
            "x_h, y_h = tl.cast(q_h, tl.int64), tl.cast(q_out_h, tl.int64)"),
    Planted(TRITON, "x_h, y_h = tl.cast(q_h, tl.int64), tl.cast(q_out_h, tl.int64)",
            "x_h, y_h = tl.cast(q_h, tl.int64), tl.cast(q_h, tl.int64)"),
)  # fmt: skip


def mutants(file: str, text: str) -> list[Mutant]:
    """Those of this file. Raises ValueError where one's text is not there exactly once."""
    found = []
    for planted in PLANTED:
        if planted.file == file:
            if text.count(planted.before) != 1:
                times = text.count(planted.before)
                raise ValueError(f"{file}: {planted.before!r} stands there {times} times, not once")
            start = text.index(planted.before)
            end = start + len(planted.before)
            found.append(make(file, text, start, end, planted.after, "planted", "", planted.host))
    return found
