"""Attention against libraries that need a process of their own: `python -m benchmarks.attention_peers`.

    python -m benchmarks.attention_peers [--quick] [--match REGEX] [--output FOLDER] [--docs]

The threads of ONNX Runtime and OpenVINO go on waiting actively after a call and slow whatever shares a process with
them. So every contestant gets a process, one at a time, in a new order each round, and is compared by its share of the
peak, measured in its process around each sample (benchmarks/attention_contestants.py). Ratios are formed within a
round.

A result that is not right gets no figure. Peers that are not installed are named; `pip install -e ".[bench]"` has them
all but zentorch. The exit status is 1 where llmkern has failed in a case.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks import attention_contestants
from benchmarks.attention_contestants import CONTESTANTS, Problem
from benchmarks.family import OURS, RESULTS, progress, slug
from llmkern.evaluation import machine
from llmkern.evaluation.timing import Spread, markdown

NAME = "attention_peers"
DOCS = machine.ROOT / "docs" / "attention_share_of_peak.md"
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
CACHES = [(12, 12, 64), (32, 8, 128)]  # heads, key heads, width
CHILD = [sys.executable, "-m"]
LONGEST = 1800.0  #: seconds after which a process counts as hanging
#: Of the lines in the plot.
COLOURS = {
    "llmkern": "#c1272d",
    "torch sdpa": "#3b6ea5",
    "zentorch": "#e08a1e",
    "OpenVINO": "#5b9a57",
    "ONNX Runtime": "#7d6ba0",
}


@dataclass
class Comparison:
    """What was measured: by problem and contestant, what each round found, and why something has no figure."""

    problems: list[Any]
    contestants: list[str]
    rounds: int
    module: ModuleType = attention_contestants  #: what its processes run
    figures: dict[str, dict[str, list[dict[str, Any] | None]]] = field(default_factory=dict)
    failed: dict[str, dict[str, str]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    disturbance: list[float] = field(default_factory=list)  #: share of all cores that others used, of each process

    def __post_init__(self) -> None:
        for p in self.problems:
            self.figures[p.name] = {c: [None] * self.rounds for c in self.contestants}
            self.failed[p.name] = {}

    def open(self, contestant: str) -> list[Any]:
        """The problems in which the contestant has not failed yet."""
        return [p for p in self.problems if contestant not in self.failed[p.name]]

    def values(self, problem: str, contestant: str, key: str = "share") -> Spread | None:
        """The spread over the rounds; None where there is no figure."""
        if contestant in self.failed[problem]:
            return None
        found = [f[key] for f in self.figures[problem][contestant] if f]
        return Spread.of(found) if found else None

    def ratio(self, problem: str, peer: str) -> Spread | None:
        """How many times the peer's share llmkern's is: the spread of the ratios of each round."""
        if self.values(problem, OURS) is None or self.values(problem, peer) is None:
            return None
        both = zip(self.figures[problem][OURS], self.figures[problem][peer], strict=True)
        found = [a["share"] / b["share"] for a, b in both if a and b]
        return Spread.of(found) if found else None

    def to_json(self) -> dict[str, Any]:
        def plain(spread: Spread | None) -> dict[str, float] | None:
            return spread._asdict() if spread else None

        cases: dict[str, Any] = {}
        for p in self.problems:
            cases[p.name] = {
                c: {
                    "share_of_peak": plain(self.values(p.name, c)),
                    "seconds": plain(self.values(p.name, c, "seconds")),
                    "llmkern_over_it": plain(self.ratio(p.name, c)) if c != OURS else None,
                    "failed": self.failed[p.name].get(c),
                    "rounds": self.figures[p.name][c],
                }
                for c in self.contestants
            }
        return {"versions": self.versions, "disturbance": self.disturbance, "cases": cases}

    def tables(self) -> str:
        """Shares of the peak, then llmkern's over each peer's, and what has no figure with the reason."""
        peers = [c for c in self.contestants if c != OURS]
        shares, ratios = [["B,H,S,D", *self.contestants]], [["B,H,S,D", *peers]]
        reasons: dict[str, list[str]] = {}
        for p in self.problems:
            found = [self.values(p.name, c) for c in self.contestants]
            shares.append([p.name, *(f"{s.median:.0%} ({s.low:.0%} to {s.high:.0%})" if s else "" for s in found)])
            over = [self.ratio(p.name, c) for c in peers]
            ratios.append([p.name, *(f"{r.median:.2f} ({r.low:.2f} to {r.high:.2f})" if r else "" for r in over)])
            for c, reason in self.failed[p.name].items():
                reasons.setdefault(f"{c}: {reason}", []).append(p.name)
        parts = [
            "Share of the peak, median of the rounds (20 to 80 %):", markdown(shares),
            "llmkern's share over each peer's, median of the rounds' ratios (20 to 80 %):", markdown(ratios),
        ]  # fmt: skip
        if reasons:
            everything = len(self.problems)
            rows = [f"- {r} ({'all' if len(n) == everything else ', '.join(n)})" for r, n in reasons.items()]
            parts += ["No figure:", "\n".join(rows)]
        return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """Compares, prints and writes. Returns the exit status."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{NAME}", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="two lengths, two rounds")
    parser.add_argument("--shapes", nargs="+", default=[], metavar="B,H,S,D", help="these instead, without a cache")
    parser.add_argument("--match", default="", metavar="REGEX", help="only the problems whose name this matches")
    parser.add_argument("--rounds", type=int, help="processes of each contestant (default 4, quick 2)")
    parser.add_argument("--samples", type=int, default=2, help="of a problem in each process, long ones 1 (default 2)")
    parser.add_argument("--sample-seconds", type=float, default=0.02, help="the shortest sample (default 0.02)")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER", help="default benchmarks/results")
    parser.add_argument("--docs", action="store_true", help=f"also write docs/{DOCS.name} and the plot beside it")
    arguments = parser.parse_args(argv)
    rounds = arguments.rounds if arguments.rounds is not None else (2 if arguments.quick else 4)
    for option, value in (("--rounds", rounds), ("--samples", arguments.samples)):
        if value < 1:
            parser.error(f"{option}: expected at least 1, got {value}")
    for text in arguments.shapes:
        if not re.fullmatch(r"\d+,\d+,\d+,\d+", text):
            parser.error(f"--shapes: expected B,H,S,D, got {text!r}")
    shapes = [tuple(int(n) for n in text.split(",")) for text in dict.fromkeys(arguments.shapes)]
    found = [p for p in problems(shapes, arguments.quick) if re.search(arguments.match, p.name)]
    if not found:
        parser.error(f"--match: expected a part of some problem's name, got {arguments.match!r}")
    described = machine.describe()
    result = Comparison(found, list(CONTESTANTS), rounds)
    compare(result, arguments.samples, arguments.sample_seconds)
    words = ["--quick"] * arguments.quick + ["--shapes", *arguments.shapes] * bool(shapes)
    words += [f"--match {arguments.match!r}"] * bool(arguments.match)
    text = report(result, machine.line(described), " ".join([f"python -m benchmarks.{NAME}", *words]))
    print(text)
    path = arguments.output / f"{NAME}-{slug(described['processor'])}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"benchmark": NAME, "machine": described, "rounds": rounds, **result.to_json()}
    path.write_text(json.dumps(content, indent=1, default=str) + "\n")
    written = [path]
    for target in [path.with_suffix(".md"), *([DOCS] if arguments.docs else [])]:
        image = target.with_suffix(".png")
        drawn = plot(result, machine.line(described), image)
        picture = f"![share of the peak against length]({image.name})\n\n" if drawn else ""
        target.write_text(text.replace("\n\n", f"\n\n{picture}", 1) + "\n")
        written += [target, *([image] if drawn else [])]
    print(f"\nwritten: {', '.join(map(str, written))}")
    return 1 if any(OURS in failed for failed in result.failed.values()) else 0


def problems(shapes: Sequence[Sequence[int]], quick: bool) -> list[Problem]:
    """Those of the given shapes, or by default those of the plot, one of a large model, and one query with a cache."""
    lengths = (512, 2048) if quick else LENGTHS
    chosen = [tuple(s) for s in shapes] or [(1, 12, s, 64) for s in lengths] + ([] if quick else [(1, 32, 2048, 128)])
    found = [Problem(s, d, c) for d in ("fp32", "bf16") for c in (False, True) for s in chosen]
    if not shapes:
        caches = [((1, h, s, d), hkv) for h, hkv, d in CACHES for s in (512, 4096)]
        found += [Problem(s, "fp32", kv_heads=hkv) for s, hkv in (caches[:1] if quick else caches)]
    return found


def compare(result: Comparison, samples: int, sample_seconds: float) -> None:
    """Runs every contestant once a round, each in processes of its own."""
    for name in result.contestants:
        if reason := result.module.missing(name):
            for p in result.problems:
                result.failed[p.name][name] = reason
    bar = progress(result.rounds * len(result.contestants))
    order, shuffle = list(result.contestants), random.Random(0).shuffle
    bar.start("processes")
    for i in range(result.rounds):
        shuffle(order)
        for name in order:
            one_round(result, name, i, samples, sample_seconds)
            bar.step()
    bar.close()


def one_round(result: Comparison, contestant: str, index: int, samples: int, sample_seconds: float) -> None:
    """Figures of one contestant in one round. Where its process dies, another one takes the problems behind.

    The problem that it died of has no figure, in no round.
    """
    left = result.open(contestant)
    while left:
        death, events = child(contestant, left, samples, sample_seconds, result.module)
        under_way = ""
        for event in events:
            name = event.pop("problem", "")
            match event.pop("event"):
                case "up":
                    result.versions.update({p: v for p, v in event["versions"].items() if v})
                case "start":
                    under_way = name
                case "figure":
                    result.figures[name][contestant][index] = event
                    under_way = ""
                case "failed":
                    result.failed[name][contestant] = event["reason"]
                    under_way = ""
                case "end":
                    result.disturbance.append(event["disturbance"])
        if not death:
            return
        if not under_way:  # it died between two problems, or before the first: nobody knows of which
            for p in left:
                if result.figures[p.name][contestant][index] is None:
                    result.failed[p.name].setdefault(contestant, death)
            return
        result.failed[under_way][contestant] = death
        names = [p.name for p in left]
        left = left[names.index(under_way) + 1 :]


def child(
    contestant: str, wanted: list[Any], samples: int, sample_seconds: float, module: ModuleType
) -> tuple[str, list[dict[str, Any]]]:
    """Runs one process: why it died (empty where it did not) and the events that it reported."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.jsonl"
        path.touch()
        job = module.job(contestant, wanted, path, samples, sample_seconds)
        death = ""
        try:
            done = subprocess.run(
                [*CHILD, module.__name__], input=job, text=True, capture_output=True, errors="replace", timeout=LONGEST,
                cwd=machine.ROOT,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            death = f"its process did not end within {LONGEST:.0f} s"
        else:
            if done.returncode < 0:
                death = f"its process died of {signal.Signals(-done.returncode).name}"
            elif done.returncode:
                last = (done.stderr.strip().splitlines() or ["without a message"])[-1]
                death = f"its process ended with status {done.returncode}: {last}"
        lines = path.read_text().splitlines()
    events = []
    for line in lines:
        try:
            events.append(json.loads(line))
        except ValueError:  # a process that dies may leave half a line
            break
    return death, events


def report(result: Comparison, line: str, command: str) -> str:
    """The page: command, machine, versions, what disturbed, tables."""
    others = Spread.of(result.disturbance) if result.disturbance else None
    versions = ", ".join(f"{n} {v}" for n, v in result.versions.items())
    facts = [f"`{command}`, processes of each contestant: {result.rounds}, in turn. {line}."]
    if versions:
        facts.append(f"{versions}.")
    if others:
        facts.append(
            f"Other processes used {others.median:.0%} of the cores meanwhile ({others.low:.0%} to {others.high:.0%}): "
            "the more they do, the less the figures say; shares above 100 % come of that."
        )
    facts.append(
        "The peak is the rate of multiply-adds of the dtype, measured beside each sample; causal counts half the work. "
        "For one query it is reading the cache once, at the rate at which a block of that size is read again and again."
    )
    return "\n\n".join(["# Attention on the CPU: share of the peak", *facts, result.tables()])


def plot(result: Comparison, caption: str, path: Path) -> bool:
    """Share of the peak against length, a panel for each dtype, plain and causal; False without matplotlib.

    Shows the shapes that share batch, heads and width with the first one.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    b, h, _, d = result.problems[0].shape
    figure, panels = plt.subplots(2, 2, figsize=(9, 6.5), sharex=True, sharey=True, layout="constrained")
    settings = [(short, causal) for short in ("fp32", "bf16") for causal in (False, True)]
    for axes, (short, causal) in zip(panels.flat, settings, strict=True):
        axes.set_title(f"{short}{', causal' if causal else ''}", fontsize=10)
        for name in result.contestants:
            points = []
            for p in result.problems:
                alike = p.shape == (b, h, p.shape[2], d) and not p.kv_heads
                spread = result.values(p.name, name) if alike and (p.short, p.causal) == (short, causal) else None
                if spread:
                    points.append((p.shape[2], spread))
            if not points:
                continue
            x, y = [s for s, _ in points], [s.median for _, s in points]
            bars = [[s.median - s.low for _, s in points], [s.high - s.median for _, s in points]]
            width = 2.2 if name == OURS else 1.3
            axes.errorbar(x, y, bars, label=name, color=COLOURS.get(name), marker="o", ms=3.5, lw=width, capsize=2)
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    lengths = sorted({p.shape[2] for p in result.problems if p.shape == (b, h, p.shape[2], d) and not p.kv_heads})
    panels[0, 0].set_ylim(0, max(1.0, panels[0, 0].get_ylim()[1]))  # which all share
    for axes in panels.flat:
        axes.set_xticks(lengths, [str(s) for s in lengths])
        axes.minorticks_off()
    for axes in panels[1]:
        axes.set_xlabel("length S")
    for axes in panels[:, 0]:
        axes.set_ylabel("share of the peak")
    handles = {}
    for axes in panels.flat:
        handles.update({label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)})
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), fontsize=9)
    figure.suptitle(f"Attention forward, B,H,S,D = {b},{h},S,{d} (median, 20 to 80 %)\n{caption}", fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return True


if __name__ == "__main__":
    sys.exit(main())
