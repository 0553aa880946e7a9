"""Measures candidates of tiles for Triton's kernels on this device, and writes a table of one's own.

    python -m benchmarks.gpu.tiles table.json [--family attention] [--kernel forward ...] [--seconds 60]
    LLMKERN_TRITON_TABLE=table.json python ...

Opt-in: nothing is tuned at run time. Candidates are those of `python -m llmkern.inspect.sweep`, in random order for as
long as the time of a kernel lasts, beside the packaged line; one that does not compile, does not fit or does not keep
the contract is left out. A line is written only where the quickest is at least 3 % quicker than the packaged one.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu import calls, timing
from benchmarks.gpu.steps import Setting
from llmkern import backend, triton, triton_table
from llmkern.evaluation import machine
from llmkern.evaluation.timing import Spread, seconds
from llmkern.inspect import sweep
from llmkern.triton_table import Line
from llmkern.verify import verify

GAIN = 1.03
CALLS = 9


@dataclass(frozen=True)
class Problem:
    """A kernel with its candidates. time: seconds of a line (None: the packaged one); raises where it cannot serve."""

    name: str
    candidates: list[Line]
    time: Callable[[Line | None], float]


@dataclass(frozen=True)
class Planned:
    """A problem to come: its tensors are made when its turn is there, and what fails then fails it alone."""

    name: str
    make: Callable[[], Problem]


def choose(
    problem: Problem, limit: float, tell: Callable[[str], None] = print, clock: Callable[[], float] = time.monotonic
) -> Line | None:
    """The quickest candidate within `limit` seconds, where it beats the packaged line by GAIN; else None."""
    until = clock() + limit
    packaged = problem.time(None)
    tell(f"{problem.name}: packaged {seconds(packaged)}")
    best: tuple[float, Line] | None = None
    tried = refused = 0
    order = list(problem.candidates)
    random.Random(0).shuffle(order)
    for line in order:
        if clock() > until:
            tell(f"{problem.name}: the time is over after {tried} of {len(order)} candidates")
            break
        tried += 1
        try:
            took = problem.time(line)
        except Exception as error:  # too much shared memory, no such tile: what Triton says of it
            refused += 1
            tell(f"{problem.name}: {line.tile}: {type(error).__name__}: {str(error).strip().splitlines()[:1]}")
            continue
        if best is None or took < best[0]:
            best = (took, line)
            tell(f"{problem.name}: {line.tile} {seconds(took)}")
    if best is None:
        tell(f"{problem.name}: none of {tried} candidates ran")
        return None
    # Once more, one behind the other: the least of many measurements is partly luck.
    again = [(problem.time(None), problem.time(best[1])) for _ in range(3)]
    gain = Spread.of(a / b for a, b in again).median
    tell(f"{problem.name}: {gain:.3f} times the packaged line, {refused} candidates refused")
    return best[1] if gain >= GAIN else None


def problems(families: Sequence[str], kernels: Sequence[str], setting: Setting) -> Iterator[Planned]:
    for family in families:
        for kernel in sweep.KERNELS[family]:
            if kernels and kernel not in kernels:
                continue
            for width in sweep.WIDTHS if family == "attention" else (0,):
                name = f"{family} {kernel}{f' {width}' if width else ''}"
                yield Planned(name, partial(problem, name, family, kernel, width, setting))


def problem(name: str, family: str, kernel: str, width: int, setting: Setting) -> Problem:
    call, small = _calls(setting, family, kernel, width)
    candidates = sweep.candidates(family, kernel, triton.family(torch.device(setting.device)), width)
    return Problem(name, candidates, lambda line: on_device(line, call, small))


def _calls(setting: Setting, family: str, kernel: str, width: int) -> tuple[calls.Call, calls.Call]:
    """What is timed, and a smaller one that is held to the contract."""
    if family == "attention":
        rows = (2, 16, 16, 2048, 2048, width), (1, 2, 1, 200, 333, width)
        timed, small = (
            calls.attention_int8(setting, s, torch.bfloat16, "causal") if kernel == "int8"
            else calls.attention(setting, s, torch.bfloat16, "causal", kernel != "forward")
            for s in rows
        )  # fmt: skip
        return timed, small
    rows_, inputs, group, activation = sweep.INT8[kernel]
    scheme = "groups by row" if group else inputs
    shapes = (rows_ if rows_ < 512 else 4096, 4096, 4096), (min(rows_, 100), 512, 256)
    timed, small = (calls.int8_linear(setting, s, torch.bfloat16, scheme, activation) for s in shapes)
    return timed, small


def on_device(line: Line | None, call: calls.Call, small: calls.Call) -> float:
    """Seconds of the call with this line, once it keeps the contract."""
    with triton_table.using([line] if line else []), backend.use("triton"):
        verify(small.function, small.plain, small.args, gradients=small.gradients).raise_if_failed()
        if call.gradients:
            inputs = [t.detach().requires_grad_() for t in call.args]
            out = call.function(*inputs)
            run = lambda: torch.autograd.grad(out, inputs, out.detach(), retain_graph=True)  # noqa: E731
        else:
            run = lambda: call.function(*call.args)  # noqa: E731
        for _ in range(timing.WARMUP):
            run()
        return Spread.of(timing.once(run, "cuda") for _ in range(CALLS)).median


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.tiles", description=(__doc__ or "").split("\n", 1)[0]
    )
    parser.add_argument("table", type=Path, help="the file to write")
    parser.add_argument("--family", nargs="+", choices=triton_table.FAMILIES, default=list(triton_table.FAMILIES))
    parser.add_argument("--kernel", nargs="+", default=[], metavar="NAME", help="only these lines of the tables")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each kernel and width (default 60)")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(f"benchmarks.gpu.tiles: torch {torch.__version__} sees no GPU", file=sys.stderr)
        return 2
    lines: list[Line] = []
    for planned in problems(options.family, options.kernel, Setting("cuda", False)):
        try:
            found = choose(planned.make(), options.seconds)
        except Exception as error:  # of one kernel, which leaves the others
            print(f"{planned.name}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        if found:
            lines.append(found)
            triton_table.write(options.table, lines, machine=machine.describe())
    triton_table.write(options.table, lines, machine=machine.describe())
    print(f"written: {options.table}, {len(lines)} lines\nLLMKERN_TRITON_TABLE={options.table} uses it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
