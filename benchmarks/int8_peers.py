"""Int8 linear against libraries that need a process of their own: `python -m benchmarks.int8_peers`.

    python -m benchmarks.int8_peers [--quick] [--shapes 16,768,768 ...] [--match REGEX] [--output FOLDER]

Every contestant gets a process, one at a time, in a new order each round, and is compared by its share of the peak,
measured in its process around each sample (see benchmarks/attention_peers.py, and int8_contestants.py for what each
library is asked). Ratios are formed within a round. Of a library's ways, the quickest that is right is timed.

A result that is not right gets no figure. Peers that are not installed are named, those that cannot run on this
processor as well. The exit status is 1 where llmkern has failed in a case.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import int8, int8_contestants
from benchmarks.attention_peers import Comparison, compare
from benchmarks.family import OURS, RESULTS, slug
from benchmarks.int8_contestants import CONTESTANTS, Problem
from llmkern.evaluation import machine
from llmkern.evaluation.timing import Spread, markdown, seconds

NAME = "int8_peers"
SHAPES = [(m, k, n) for k, n in int8.LAYERS[:-1] for m in (1, 16, 128, 512)]
QUICK = [(1, 768, 768), (128, 768, 3072)]


class Int8Comparison(Comparison):
    """The same with the best peer of each problem."""

    def best(self, problem: str) -> str | None:
        """The peer of the largest share."""
        found = {c: self.values(problem, c) for c in self.contestants if not c.startswith(OURS)}
        shares = {c: s.median for c, s in found.items() if s}
        return max(shares, key=lambda c: shares[c], default=None)

    def way(self, problem: str, contestant: str) -> str:
        """The one that it was asked in, in most rounds."""
        ways = [f["way"] for f in self.figures[problem][contestant] if f]
        return max(set(ways), key=ways.count)

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "best_peer": {p.name: self.best(p.name) for p in self.problems}}

    def tables(self) -> str:
        """Times with shares of the peak, then llmkern's share over each peer's, and what has no figure."""
        peers = [c for c in self.contestants if not c.startswith(OURS)]
        times = [["M,K,N", *self.contestants]]
        ratios = [["M,K,N", "the best peer", f"{OURS} over it", "20 to 80 %", *peers]]
        for p in self.problems:
            cells = [p.name]
            for c in self.contestants:
                time, share = self.values(p.name, c, "seconds"), self.values(p.name, c)
                cells.append(f"{seconds(time.median)} ({share.median:.0%})" if time and share else "")
            times.append(cells)
            best = self.best(p.name)
            over = self.ratio(p.name, best) if best else None
            cells = [p.name, f"{best}, {self.way(p.name, best)}" if best else ""]
            cells += [f"{over.median:.2f}", f"{over.low:.2f} to {over.high:.2f}"] if over else ["", ""]
            each = [self.ratio(p.name, c) for c in peers]
            ratios.append([*cells, *(f"{r.median:.2f}" if r else "" for r in each)])
        parts = [
            "Time, and share of the peak (medians of the rounds):", markdown(times),
            "llmkern's share over each peer's, median of the rounds' ratios:", markdown(ratios),
        ]  # fmt: skip
        if rows := self.reasons():
            parts += ["No figure:", "\n".join(rows)]
        return "\n\n".join(parts)

    def reasons(self) -> list[str]:
        found: dict[str, list[str]] = {}
        for p in self.problems:
            for c, reason in self.failed[p.name].items():
                if c == "zentorch" and reason.startswith("its process"):
                    reason += " (it is made for AMD's processors)"
                found.setdefault(f"{c}: {reason}", []).append(p.name)
        all_of = {
            "all": {p.name for p in self.problems},
            **{f"all {s}": {p.name for p in self.problems if p.short == s} for s in ("fp32", "bf16")},
        }
        words = {frozenset(names): word for word, names in all_of.items()}
        return [f"- {reason} ({words.get(frozenset(names), ', '.join(names))})" for reason, names in found.items()]


def main(argv: Sequence[str] | None = None) -> int:
    """Compares, prints and writes. Returns the exit status."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{NAME}", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="two shapes, two rounds")
    parser.add_argument("--shapes", nargs="+", default=[], metavar="M,K,N", help="these instead")
    parser.add_argument("--match", default="", metavar="REGEX", help="only the problems whose name this matches")
    parser.add_argument("--rounds", type=int, help="processes of each contestant (default 4, quick 2)")
    parser.add_argument("--samples", type=int, default=2, help="of a problem in each process, long ones 1 (default 2)")
    parser.add_argument("--sample-seconds", type=float, default=0.02, help="the shortest sample (default 0.02)")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER", help="default benchmarks/results")
    arguments = parser.parse_args(argv)
    rounds = arguments.rounds if arguments.rounds is not None else (2 if arguments.quick else 4)
    for option, value in (("--rounds", rounds), ("--samples", arguments.samples)):
        if value < 1:
            parser.error(f"{option}: expected at least 1, got {value}")
    shapes = []
    for text in dict.fromkeys(arguments.shapes):
        if not re.fullmatch(r"\d+,\d+,\d+", text):
            parser.error(f"--shapes: expected M,K,N, got {text!r}")
        m, k, n = map(int, text.split(","))
        shapes.append((m, k, n))
    chosen = shapes or (QUICK if arguments.quick else SHAPES)
    problems = [Problem(s, short) for short in ("fp32", "bf16") for s in chosen]
    found = [p for p in problems if re.search(arguments.match, p.name)]
    if not found:
        parser.error(f"--match: expected a part of some problem's name, got {arguments.match!r}")
    described = machine.describe()
    result = Int8Comparison(found, list(CONTESTANTS), rounds, int8_contestants)
    compare(result, arguments.samples, arguments.sample_seconds)
    words = ["--quick"] * arguments.quick + ["--shapes", *arguments.shapes] * bool(shapes)
    words += [f"--match {arguments.match!r}"] * bool(arguments.match)
    text = report(result, machine.line(described), " ".join([f"python -m benchmarks.{NAME}", *words]))
    print(text)
    path = arguments.output / f"{NAME}-{slug(described['processor'])}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"benchmark": NAME, "machine": described, "rounds": rounds, **result.to_json()}
    path.write_text(json.dumps(content, indent=1, default=str) + "\n")
    path.with_suffix(".md").write_text(text + "\n")
    print(f"\nwritten: {path}, {path.with_suffix('.md')}")
    return 1 if any(c.startswith(OURS) for failed in result.failed.values() for c in failed) else 0


def report(result: Int8Comparison, line: str, command: str) -> str:
    """The page: command, machine, versions, what disturbed, tables."""
    facts = [f"`{command}`, processes of each contestant: {result.rounds}, in turn. {line}."]
    if result.versions:
        facts.append(", ".join(f"{n} {v}" for n, v in result.versions.items()) + ".")
    if result.disturbance:
        others = Spread.of(result.disturbance)
        facts.append(
            f"Other processes used {others.median:.0%} of the cores meanwhile ({others.low:.0%} to {others.high:.0%}): "
            "the more they do, the less the figures say; shares above 100 % come of that."
        )
    facts.append(
        "fp32 and bf16 are the dtype of activations and result. The peak is the rate of 8-bit multiply-adds, or "
        "for few rows reading the int8 weight at the rate at which a block of that size is read again and again, "
        "measured beside each sample, whatever the contestant multiplies. `torch` quantises nothing, nor does ONNX "
        "Runtime fp32."
    )
    return "\n\n".join(["# Int8 linear on the CPU", *facts, result.tables()])


if __name__ == "__main__":
    sys.exit(main())
