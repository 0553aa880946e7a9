"""One row of the inspector's table: a kernel, compiled for a target."""

from __future__ import annotations

from dataclasses import dataclass

from llmkern.inspect import limits, mix, sass


@dataclass(frozen=True)
class Row:
    """The fields are the keys of the JSON, described in docs/inspect.md. None: cannot be told from the code."""

    kernel: str
    source: str  # "cuda" or "triton"
    config: str
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int | None
    occupancy: float | None
    matrix_instructions: dict[str, int]
    bracket_serial: float | None
    bracket_bound: float | None
    bracket_turns: float | None = None


def row(
    kernel: str, source: str, config: str, target: str, registers: int, spill_bytes: int, shared_bytes: int | None,
    threads: int | None, code: list[sass.Instruction],
) -> Row:  # fmt: skip
    """The row of a kernel with these resources, `threads` in a block, and this machine code."""
    occupancy = None
    if shared_bytes is not None and threads is not None:
        occupancy = round(limits.occupancy(target, registers, shared_bytes, threads), 4)
    loop = sass.main_loop(code)
    serial, bound = mix.bracket(loop, target)
    turns = mix.turns(loop, target)
    return Row(
        kernel, source, config, target, registers, spill_bytes, shared_bytes, occupancy,
        sass.matrix_instructions(code), serial and round(serial, 4), bound and round(bound, 4),
        turns and round(turns, 4),
    )  # fmt: skip
