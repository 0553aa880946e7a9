"""The command line: `python -m llmkern inspect`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable

from llmkern.inspect import SOURCES, TARGETS, budgets, inspect, triton_source
from llmkern.inspect.errors import InspectError
from llmkern.inspect.row import Row
from llmkern.table import in_columns

HEAD = (
    "kernel",
    "source",
    "config",
    "target",
    "regs",
    "spill",
    "shared",
    "occup.",
    "share of peak",
    "turns",
    "matrix instr.",
)


def _percent(x: float | None) -> str:
    return "-" if x is None else f"{100 * x:.0f}%"


def cells(r: Row) -> tuple[str, ...]:
    """A row as the table shows it."""
    share = "-" if r.bracket_serial is None else f"{_percent(r.bracket_serial)} - {_percent(r.bracket_bound)}"
    if share != "-" and not r.matrix_instructions:
        share += " mem"
    matrix = ", ".join(f"{n} {kind}" for kind, n in r.matrix_instructions.items())
    shared = "?" if r.shared_bytes is None else str(r.shared_bytes)
    occupancy = "?" if r.occupancy is None else _percent(r.occupancy)
    return (
        r.kernel, r.source, r.config, r.target, str(r.registers), str(r.spill_bytes), shared, occupancy, share,
        _percent(r.bracket_turns), matrix or "-",
    )  # fmt: skip


def table(rows: Iterable[Row]) -> str:
    lines = [HEAD, *map(cells, rows)]
    return "\n".join(in_columns(lines))


def to_json(rows: Iterable[Row]) -> str:
    return json.dumps([dataclasses.asdict(r) for r in rows], indent=1) + "\n"


def _progress(done: int, total: int, label: str) -> None:
    print(f"[{done}/{total}] {label}", file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    """Prints the table; 1, with one sentence on stderr, where something is missing, unknown or does not compile."""
    parser = argparse.ArgumentParser(
        prog="python -m llmkern inspect",
        description="Compiles every kernel for every target and shows what the machine code needs and could reach. "
        "Modelled from the code, not measured: docs/inspect.md.",
    )
    parser.add_argument(
        "--target", nargs="+", default=list(TARGETS), metavar="TARGET", help=f"default: {' '.join(TARGETS)}"
    )
    parser.add_argument("--kernel", metavar="NAME", help="only kernels whose name holds NAME")
    parser.add_argument("--source", choices=SOURCES, help="only CUDA C++, or only Triton (default: both)")
    parser.add_argument("--json", metavar="FILE", help="also write the rows to FILE, as a list of objects")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    parser.add_argument("--check", action="store_true", help="fail where a kernel needs more than its budget")
    parser.add_argument(
        "--write-budgets", action="store_true", help="set the budgets of what is compiled to what it needs"
    )
    options = parser.parse_args(arguments)
    if options.json:
        try:  # before minutes of compiling
            with open(options.json, "a"):  # what it holds stays until there is something better
                pass
        except OSError as error:
            print(f"llmkern inspect: --json {options.json}: {error.strerror}", file=sys.stderr)
            return 1
    sources = (options.source,) if options.source else SOURCES
    if not options.source and not triton_source.installed():
        print("llmkern inspect: Triton is not installed, its kernels are left out", file=sys.stderr)
    try:
        rows = inspect(options.target, options.kernel, sources, (lambda *_: None) if options.quiet else _progress)
    except InspectError as error:
        print(f"llmkern inspect: {error}", file=sys.stderr)
        return 1
    print(table(rows))
    if options.json:
        with open(options.json, "w") as file:
            file.write(to_json(rows))
    if options.write_budgets:
        budgets.write(rows)
    complaints = budgets.over(rows, budgets.load()) if options.check else []
    for complaint in complaints:
        print(f"llmkern inspect: {complaint}", file=sys.stderr)
    return 1 if complaints else 0
