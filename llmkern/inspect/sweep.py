"""Compiles candidates of tiles, warps and stages for a Triton kernel, and ranks them by a model: no GPU takes part.

    python -m llmkern.inspect.sweep attention forward --target sm_90 [--width 128]
    python -m llmkern.inspect.sweep int8 one --target sm_90

It stands beside the inspector because it compiles and reads machine code with it. Candidates that spill, or of which no
block fits on an SM, are rejected. The others are ranked by `modelled`, the least of
  serial:  the bracket's share of the tensor cores' peak with nothing overlapping (docs/inspect.md),
  traffic: multiply-adds for each byte that a tile reads, times L2_BYTES a cycle, over the tensor cores' rate,
times the resident warps over 8 where there are fewer, which is how many hide the latency of a dependent instruction.
Modelled is not measured: `python -m benchmarks.gpu.tiles` measures on a device.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from llmkern import triton, triton_table
from llmkern.inspect import limits, mix, triton_source
from llmkern.inspect.errors import InspectError
from llmkern.inspect.row import Row
from llmkern.triton_table import Line

#: Bytes that an SM gets from the second-level cache in a cycle: an assumption of the model, the same for all.
L2_BYTES = 32
ENOUGH_WARPS = 8
WIDTHS = (64, 128, 256)
#: kernel of the table -> the Triton function of attention.
ATTENTION = {
    "forward": "attention_forward_kernel", "queries": "attention_backward_query_kernel",
    "keys": "attention_backward_key_kernel", "int8": "attention_int8_kernel",
}  # fmt: skip
#: kernel of the table -> rows, inputs, group, activation of a call that takes it.
INT8: dict[str, tuple[int, str, int, str]] = {
    "few": (8, "outliers", 0, "none"), "groups": (512, "row", 128, "none"), "pairs": (512, "outliers", 0, "swiglu"),
    "pairs of groups": (512, "row", 128, "swiglu"), "up to 64": (64, "row", 0, "none"),
    "two": (512, "outliers", 0, "none"), "one": (256, "row", 0, "none"), "many": (512, "row", 0, "none"),
}  # fmt: skip
#: What multiplies, of the launches of such a call.
PRODUCTS = ("linear_kernel", "split_kernel", "split_groups_kernel")
#: family -> its kernels.
KERNELS: dict[str, list[str]] = {"attention": list(ATTENTION), "int8": list(INT8)}


@dataclass(frozen=True)
class Ranked:
    """A candidate with what its compilation showed. rejected: why; empty where it is ranked."""

    line: Line
    row: Row | None
    traffic: float
    modelled: float
    rejected: str = ""


def architecture(family: str, target: str) -> str:
    """The target as the family's table names it."""
    if family == "int8":
        return target
    from llmkern.attention.triton_configurations import family as line

    if not target.startswith("sm_"):  # AMD's
        return line(None)
    number = int(target.removeprefix("sm_"))
    return line((number // 10, number % 10))


def candidates(family: str, kernel: str, target: str, width: int) -> list[Line]:
    """Tiles of 16 to 128 (int8: 256), 4 or 8 warps, 1 to 4 stages."""
    names = triton_table.FAMILIES[family][1]
    most = 128 if family == "attention" else 256
    sizes = [n for n in (16, 32, 64, 128, 256) if n <= most]
    first = (16,) if kernel == "few" else tuple(n for n in sizes if n >= 32)
    made = itertools.product(first, (n for n in sizes if n >= 32), (4, 8), (1, 2, 3, 4))
    at = architecture(family, target)
    return [
        Line(family, kernel, at, width if family == "attention" else 0,
             {names[0]: a, names[1]: b, "warps": warps, "stages": stages})
        for a, b, warps, stages in made
    ]  # fmt: skip


def launch(line: Line) -> triton.Launch:
    """The kernel's launch in a typical call with this line in the table, in bfloat16."""
    launches: list[triton.Launch] = []
    with triton_table.using([line]):
        if line.family == "attention":
            from llmkern.attention import triton_int8_launch, triton_launch

            launcher = triton_int8_launch if line.kernel == "int8" else triton_launch
            launches += launcher.examples(line.architecture, torch.bfloat16, line.width)
            return next(x for x in launches if x.kernel == ATTENTION[line.kernel])
        from llmkern.int8.triton_launch import plan

        rows, inputs, group, activation = INT8[line.kernel]
        x, weight = (torch.empty(n, 4096, device="meta", dtype=torch.bfloat16) for n in (rows, 4096))
        scale = torch.empty(4096, 4096 // group, device="meta") if group else torch.empty(4096, device="meta")
        arguments = (x, weight.to(torch.int8), scale, x[:, 0], None, None, inputs, group, 1, activation)
        plan(launches.append, line.architecture, *arguments)(*arguments)
        return next(x for x in launches if x.kernel in PRODUCTS)


def compile_one(line: Line, target: str) -> Row:
    made = launch(line)
    config = ", ".join(f"{k}={v}" for k, v in line.tile.items())
    return triton_source.compile_one(triton_source.Compilation.of(made, config), target)


def traffic(line: Line, target: str) -> float:
    """The share of the tensor cores' rate that the bytes a tile reads allow, at L2_BYTES a cycle."""
    rates = mix.RATES[limits.base(target)]
    a, b = (line.tile[name] for name in triton_table.FAMILIES[line.family][1])
    if line.family == "int8":  # rows and columns of int8 for each k; two digits and pairs read one of them twice
        read, products, rate = a + b, a * b, rates.int8
        if line.kernel in ("two", "few"):
            read, products = 2 * a + b, 2 * a * b
        elif line.kernel.startswith("pairs"):
            read, products = a + 2 * b, 2 * a * b
    else:  # what moves past the tile that stays: two matrices of 2 bytes, and 2, 3 or 4 products of them
        stays = b if line.kernel == "keys" else a
        read, products, rate = 4, {"forward": 2, "queries": 3, "keys": 4, "int8": 2}[line.kernel] * stays, rates.fp16
        if line.kernel == "int8":  # keys of 1 byte, whose products take half the time of fp16's
            return min(1.0, 1.5 * stays / 3 * L2_BYTES / rate)
    return min(1.0, products / read * L2_BYTES / rate)


def rank(
    lines: Sequence[Line],
    target: str,
    compiled: Callable[[Line, str], Row] = compile_one,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Ranked]:
    """The best first, the rejected ones last."""
    found = []
    for done, line in enumerate(lines, 1):
        found.append(_judge(line, target, compiled))
        progress(done, len(lines))
    return sorted(found, key=lambda r: (bool(r.rejected), -r.modelled, -(r.row.occupancy or 0.0) if r.row else 0.0))


def _judge(line: Line, target: str, compiled: Callable[[Line, str], Row]) -> Ranked:
    moved = traffic(line, target)
    try:
        row = compiled(line, target)
    except InspectError as error:
        last = [text for text in str(error).strip().splitlines() if text.strip()][-1]
        return Ranked(line, None, moved, 0.0, f"does not compile: {last.strip()[:100]}")
    most = limits.LIMITS[limits.base(target)].shared_block
    if row.spill_bytes:
        return Ranked(line, row, moved, 0.0, f"spills {row.spill_bytes} bytes")
    if (row.shared_bytes or 0) > most or not row.occupancy:
        return Ranked(line, row, moved, 0.0, f"no block fits: {row.shared_bytes} bytes of shared memory, most {most}")
    serial = 1.0 if row.bracket_serial is None else row.bracket_serial
    warps = row.occupancy * limits.LIMITS[limits.base(target)].warps
    return Ranked(line, row, moved, min(serial, moved) * min(1.0, warps / ENOUGH_WARPS))


def _tile(line: Line) -> str:
    return ", ".join(map(str, line.tile.values()))


def table(ranked: Sequence[Ranked]) -> str:
    names = [*triton_table.FAMILIES[ranked[0].line.family][1], "warps", "stages"]
    rows = [[*names, "regs", "spill", "shared", "occup.", "serial", "traffic", "modelled", ""]]
    for r in ranked:
        cells = [str(n) for n in r.line.tile.values()]
        if r.row is None:
            cells += ["-"] * 5
        else:
            serial = "-" if r.row.bracket_serial is None else f"{r.row.bracket_serial:.0%}"
            occupancy = "?" if r.row.occupancy is None else f"{r.row.occupancy:.0%}"
            cells += [str(r.row.registers), str(r.row.spill_bytes), str(r.row.shared_bytes), occupancy, serial]
        rows.append([*cells, f"{r.traffic:.0%}", "-" if r.rejected else f"{r.modelled:.0%}", r.rejected])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def as_configured(best: Line, target: str) -> str:
    """The line as it would stand in the family's triton_configurations.py."""
    if best.family == "int8":
        return f'"{best.kernel}": {{"{target}": Tile({_tile(best)})}},'
    number = best.architecture.split("_")[-1]
    return f"_{best.kernel.upper()}_{number} = (({best.width}, _C({_tile(best)})),)"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m llmkern.inspect.sweep", description=(__doc__ or "").split("\n", 1)[0]
    )
    parser.add_argument("family", choices=KERNELS)
    parser.add_argument("kernel", help="; ".join(f"{f}: {', '.join(k)}" for f, k in KERNELS.items()))
    parser.add_argument("--target", default="sm_90", choices=tuple(limits.LIMITS))
    parser.add_argument("--width", type=int, default=128, choices=WIDTHS, help="of attention's heads (default 128)")
    parser.add_argument("--most", type=int, help="only the first so many candidates")
    options = parser.parse_args(argv)
    if options.kernel not in KERNELS[options.family]:
        parser.error(f"kernel: expected one of {', '.join(KERNELS[options.family])}, got {options.kernel!r}")
    if not triton_source.installed():
        print("llmkern.inspect.sweep: Triton is not installed: `pip install triton`", file=sys.stderr)
        return 1

    def progress(done: int, total: int) -> None:
        print(f"\r[{done}/{total}]", end="" if done < total else "\n", file=sys.stderr, flush=True)

    lines = candidates(options.family, options.kernel, options.target, options.width)[: options.most]
    ranked = rank(lines, options.target, progress=progress)
    print(f"{options.family}, {options.kernel}, {options.target}: compiled and modelled, not measured\n")
    print(table(ranked))
    if ranked[0].rejected:
        print("\nno candidate is left", file=sys.stderr)
        return 1
    print(f"\n{as_configured(ranked[0].line, options.target)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
