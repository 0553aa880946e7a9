"""A table of one's own for Triton's tiles: the file that LLMKERN_TRITON_TABLE names, instead of the packaged lines.

    {"version": 1, "lines": [{"family": "attention", "kernel": "forward", "architecture": "sm_90", "width": 128,
                              "tile": {"queries": 128, "keys": 64, "warps": 8, "stages": 3}}]}

`python -m benchmarks.gpu.tiles` measures and writes one. A line holds for calls of just its kernel, architecture and
width (int8: 0); the packaged tables serve the others. Attention's lines are of elements of 2 bytes without rules that
need registers of their own. The file is read once, at the first call of a Triton kernel.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VARIABLE = "LLMKERN_TRITON_TABLE"
VERSION = 1
#: Of each family: the packaged table, whose keys are the kernels, and what a tile has, besides warps and stages.
FAMILIES = {"attention": ("TABLE", ("queries", "keys")), "int8": ("TILES", ("rows", "columns"))}
KEYS = {"family", "kernel", "architecture", "width", "tile"}
MOST = {"warps": 16, "stages": 8}


@dataclass(frozen=True)
class Line:
    """architecture: as the family's own table names it. width: of attention, the padded one of its heads; else 0."""

    family: str
    kernel: str
    architecture: str
    width: int
    tile: dict[str, int]


_lines: dict[tuple[str, str, str, int], dict[str, int]] | None = None


def own(family: str, kernel: str, architecture: str, width: int = 0) -> dict[str, int] | None:
    """The tile of one's own table, or None. Raises ValueError, at the first call, for a bad file."""
    global _lines
    if _lines is None:
        path = os.environ.get(VARIABLE)
        _lines = _by_key(read(Path(path))) if path else {}
    return _lines.get((family, kernel, architecture, width))


def _by_key(lines: Sequence[Line]) -> dict[tuple[str, str, str, int], dict[str, int]]:
    return {(x.family, x.kernel, x.architecture, x.width): x.tile for x in lines}


@contextmanager
def using(lines: Sequence[Line]) -> Iterator[None]:
    """Inside the block these lines are the table; plans made before are the caller's to forget."""
    global _lines
    before, _lines = _lines, _by_key(lines)
    try:
        yield
    finally:
        _lines = before


def read(path: Path) -> list[Line]:
    """The lines of a file. Raises ValueError that names the variable, the file and what was expected where."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{VARIABLE}: {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{VARIABLE}: {path} is no JSON: {error}") from None
    if not isinstance(content, dict) or content.get("version") != VERSION or not isinstance(content.get("lines"), list):
        raise ValueError(f'{VARIABLE}: {path}: expected {{"version": {VERSION}, "lines": [...]}}')
    lines = []
    for i, entry in enumerate(content["lines"]):
        wrong = _wrong(entry)
        if wrong:
            raise ValueError(f"{VARIABLE}: {path}: lines[{i}]: {wrong}")
        lines.append(Line(**entry))
    if len(_by_key(lines)) < len(lines):
        raise ValueError(f"{VARIABLE}: {path}: expected one line for each family, kernel, architecture and width")
    return lines


def _wrong(entry: Any) -> str | None:
    """What is wrong with a line, or None."""
    if not isinstance(entry, dict) or set(entry) != KEYS:
        return f"expected the keys {', '.join(sorted(KEYS))}, got {entry!r}"
    family = entry["family"]
    if family not in FAMILIES:
        return f"family: expected one of {', '.join(FAMILIES)}, got {family!r}"
    table, of_tile = FAMILIES[family]
    kernels = tuple(getattr(importlib.import_module(f"llmkern.{family}.triton_configurations"), table))
    if entry["kernel"] not in kernels:
        return f"kernel: expected one of {', '.join(kernels)}, got {entry['kernel']!r}"
    if not isinstance(entry["architecture"], str) or not entry["architecture"].startswith(("sm_", "gfx")):
        return f'architecture: expected "sm_90", "gfx942" or the like, got {entry["architecture"]!r}'
    if type(entry["width"]) is not int or entry["width"] < 0:
        return f"width: expected an integer of at least 0, got {entry['width']!r}"
    tile, fields = entry["tile"], {*of_tile, *MOST}
    if not isinstance(tile, dict) or set(tile) != fields:
        return f"tile: expected the keys {', '.join(sorted(fields))}, got {tile!r}"
    for name, n in tile.items():
        if type(n) is not int or n < 1:
            return f"tile: {name}: expected a positive integer, got {n!r}"
        if name == "stages":
            if n > MOST[name]:
                return f"tile: stages: expected at most {MOST[name]}, got {n}"
        elif n & (n - 1) or n > MOST.get(name, 256) or n < (1 if name in MOST else 16):
            low, high = (1, MOST[name]) if name in MOST else (16, 256)
            return f"tile: {name}: expected a power of two from {low} to {high}, got {n}"
    return None


def write(path: Path, lines: Sequence[Line], **notes: Any) -> None:
    """notes: where and when they were measured; not read again."""
    content = {"version": VERSION, **notes, "lines": [vars(x) for x in lines]}
    path.write_text(json.dumps(content, indent=1) + "\n")
