"""What the script of a family does: prove each case right at its shape, time it against its peers, print, write.

    python -m benchmarks.attention [--quick] [--shapes 1,12,2048,64 ...] [--isa avx2] [--output FOLDER]

A case whose result does not pass the contract gets no figure, and the script ends with status 1.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import isa
from llmkern.evaluation import machine, roofline
from llmkern.evaluation.timing import Result, markdown, measure, seconds
from llmkern.verify import Report

RESULTS = Path(__file__).resolve().parent / "results"
OURS = "llmkern"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Case:
    """One comparison at one shape. Contestants whose name starts with "llmkern" are ours, the others are peers."""

    name: str
    contestants: Mapping[str, Callable[[], Any]]
    baseline: str
    check: Callable[[], Report]  #: what ours computes, held to the contract
    flops: float = 0.0
    bytes: float = 0.0
    dtype: torch.dtype = torch.float32  #: the arithmetic that the peak refers to
    skipped: Mapping[str, str] | None = None  #: peers that cannot run here, and why


@dataclass
class Options:
    quick: bool
    shapes: list[tuple[int, ...]]
    compile: bool


def main(
    name: str,
    doc: str | None,
    build: Callable[[Options], Iterator[Case]],
    shape: str,
    argv: Sequence[str] | None = None,
) -> int:
    """Runs the cases of a family. shape: what a shape lists, as in "B,H,S,D". Returns the exit status."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=(doc or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="few shapes, few rounds, without torch.compile")
    parser.add_argument("--shapes", nargs="+", default=[], metavar=shape, help="these instead of the family's own")
    parser.add_argument("--match", default="", metavar="REGEX", help="only the cases whose name this matches")
    parser.add_argument("--rounds", type=int, help="samples of each contestant (default 11, quick 5)")
    parser.add_argument("--sample-seconds", type=float, default=0.01, help="the shortest sample (default 0.01)")
    parser.add_argument("--isa", choices=isa.choices(), help="force an instruction set on llmkern and on torch")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER", help="default benchmarks/results")
    arguments = parser.parse_args(argv)
    if arguments.isa:
        status = isa.elsewhere(f"benchmarks.{name}", sys.argv[1:] if argv is None else argv, arguments.isa)
        if status is not None:
            return status
    shapes = []
    for text in arguments.shapes:
        if not re.fullmatch(r"\d+(,\d+)*", text) or text.count(",") != shape.count(","):
            parser.error(f"--shapes: expected {shape}, got {text!r}")
        shapes.append(tuple(int(n) for n in text.split(",")))
    options = Options(arguments.quick, shapes, not (arguments.quick or arguments.no_compile))
    rounds = arguments.rounds or (5 if arguments.quick else 11)
    description = machine.describe()
    peaks = roofline.peaks(3 if arguments.quick else 9)
    print(f"# {name}\n\n{machine.line(description)}\n\n{peaks}\n")
    results: dict[str, Result] = {}
    wrong: dict[str, str] = {}
    bar = progress(rounds)
    for case in build(options):
        if not re.search(arguments.match, case.name):
            continue
        bar.start(case.name)
        torch.compiler.reset()
        report = case.check()
        if not report:
            wrong[case.name] = str(report)
            continue
        floor = roofline.floor(case.flops, case.dtype, case.bytes) if case.flops or case.bytes else None
        result = measure(
            case.contestants, baseline=case.baseline, rounds=rounds, sample_seconds=arguments.sample_seconds,
            floor=floor, progress=bar.step,
        )  # fmt: skip
        result.failed.update(case.skipped or {})
        results[case.name] = result
    bar.close()
    for title, result in results.items():
        print(f"## {title}\n\n{result.table()}\n")
    for title, report in wrong.items():
        print(f"## {title}: WRONG, so not timed\n\n{report}\n")
    text = summary(results)
    print(text)
    words = [name, slug(description["processor"]), *([arguments.isa] if arguments.isa else [])]
    path = arguments.output / f"{'-'.join(words)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "benchmark": name,
        "machine": description,
        "isa_forced": arguments.isa,
        "peaks": peaks.to_json(),
        "rounds": rounds,
        "wrong": wrong,
        "summary": text,
        "cases": {title: {**r.to_json(), "best_peer": best_peer(r)} for title, r in results.items()},
    }
    path.write_text(json.dumps(content, indent=1, default=str) + "\n")
    written = [str(path)]
    if results and plot(name, results, machine.line(description), path.with_suffix(".png")):
        written.append(str(path.with_suffix(".png")))
    print(f"\nwritten: {', '.join(written)}")
    return 1 if wrong else 0


def ours(result: Result) -> list[str]:
    return [n for n in result.names if n.startswith(OURS)]


def best_peer(result: Result) -> str | None:
    """The fastest of the others."""
    peers = [n for n in result.names if not n.startswith(OURS)]
    return min(peers, key=lambda n: result.time(n).median, default=None)


def summary(results: Mapping[str, Result]) -> str:
    """One row for each case and contestant of ours."""
    lines = [["case", "", "time", "times the baseline", "20 to 80 %", "times the best peer", "of the peak"]]
    for title, result in results.items():
        peer = best_peer(result)
        for name in ours(result):
            cells = [title, name, seconds(result.time(name).median)]
            if result.baseline in result.samples:
                r = result.ratio(name)
                cells += [f"{r.median:.2f} ({result.baseline})", f"{r.low:.2f} to {r.high:.2f}"]
            else:
                cells += ["", ""]
            cells.append(f"{result.ratio(name, peer).median:.2f} ({peer})" if peer else "")
            share = result.share(name)
            lines.append([*cells, f"{share.median:.0%}" if share else ""])
    return markdown(lines)


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unknown"


def plot(name: str, results: Mapping[str, Result], caption: str, path: Path) -> bool:
    """Speed-ups over the baseline with their spread; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = [(f"{t}, {n}", r.ratio(n)) for t, r in results.items() if r.baseline in r.samples for n in ours(r)]
    figure, axes = plt.subplots(figsize=(9, 1.6 + 0.28 * len(bars)), layout="constrained")
    middles = [s.median for _, s in bars]
    spread = [[s.median - s.low for _, s in bars], [s.high - s.median for _, s in bars]]
    axes.barh([label for label, _ in bars], middles, xerr=spread, color="#3b6ea5", ecolor="#333333", capsize=2)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as the baseline (median of the rounds' ratios, 20 to 80 %)")
    figure.suptitle(f"{name}\n{caption}", fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


class progress:
    """A bar on the terminal where tqdm is there, a line per case on stderr otherwise."""

    def __init__(self, rounds: int):
        self.rounds, self.bar = rounds, None
        try:
            from tqdm import tqdm
        except ImportError:
            return
        self.bar = tqdm(total=0, unit="round", file=sys.stderr, leave=False)

    def start(self, title: str) -> None:
        if self.bar is None:
            print(f"{title} ...", file=sys.stderr, flush=True)
        else:
            self.bar.total += self.rounds
            self.bar.set_description(title)

    def step(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
