"""The figures of docs/attention_decode.md that the emulator counts: python -m tests.emulation.decode_counts"""

from __future__ import annotations

import pytest
import torch

from llmkern.functional import attention_with_kvcache
from tests.attention.decode_cases import ONE_PIECE, PIECES, inputs, ours
from tests.emulation.attention_on_ptx import CachedOnEmulator, serve_cached
from tests.emulation.ptx.count import Summary
from tests.emulation.ptx.launch import Report

TILE = 16  # keys


def attend(emulated: CachedOnEmulator, width: int, keys: int, int8: bool) -> Report:
    """One new token of 8 heads on one head of keys."""
    q, *caches = inputs(1, 1, 8, 1, width, width, keys, torch.float16)
    scales: list[torch.Tensor | None] = [None, None]
    if int8:
        caches, scales = [c.to(torch.int8) for c in caches], [torch.ones(c.shape[:3]) for c in caches]
    ours(q, *caches, None, None, *scales)
    report = emulated.last("decode_kernel")
    assert report is not None
    return report


def append(emulated: CachedOnEmulator, interleaved: bool, angles: torch.dtype) -> Summary:
    """4 new tokens of two sequences: 8 heads of queries and 2 of keys and values, of width 128, all of it turned."""
    q, *caches = inputs(2, 4, 8, 2, 128, 128, 64, torch.float16)
    new = [torch.randn(2, 4, 2, 128, dtype=torch.float16) for _ in range(2)]
    tables = [torch.randn(64, 64).to(angles) for _ in range(2)]
    attention_with_kvcache(
        q, *caches, *new, *tables, torch.tensor([10, 20]), causal=True, rotary_interleaved=interleaved
    )  # fmt: skip
    return counts(emulated.last("cache_kernel"))


def counts(report: Report | None) -> Summary:
    assert report is not None and report.counts is not None
    return report.counts


def row(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|")


def main() -> None:
    monkeypatch = pytest.MonkeyPatch()
    emulated = CachedOnEmulator(counts=True)
    serve_cached(monkeypatch, emulated, ONE_PIECE)
    print(
        "In one piece, 256 keys: bytes by 16-byte loads, their sectors, the fewest, instructions of a warp for a tile"
    )
    for width in (64, 128, 256):
        for int8 in (False, True):
            found = attend(emulated, width, 256, int8)
            more = attend(emulated, width, 512, int8).issued - found.issued
            loads = [s for s in counts(found).sites if s.space == "global" and not s.writes and "v4" in s.text]
            moved = [sum(getattr(s, name) for s in loads) for name in ("bytes", "units", "fewest")]
            row(width, "int8" if int8 else "float16", *moved, round(more / (256 / TILE)))
    serve_cached(monkeypatch, emulated, PIECES)
    print("In three pieces, 600 keys: sectors read and written, the fewest of each")
    for width in (64, 128, 256):
        found = attend(emulated, width, 600, False)
        for name, report in (("attention", found), ("join", emulated.last("join_pieces_kernel"))):
            row(width, name, *counts(report).sectors, *counts(report).fewest)
    print("Rotated: sectors read and written, the fewest of each, different ones read")
    for interleaved in (False, True):
        for dtype in (torch.float32, torch.float16):
            c = append(emulated, interleaved, dtype)
            row("interleaved" if interleaved else "half-split", dtype, *c.sectors, *c.fewest, c.touched[0])
    monkeypatch.undo()


if __name__ == "__main__":
    main()
