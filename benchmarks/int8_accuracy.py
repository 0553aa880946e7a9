"""What int8 costs in accuracy and what it gains in time, by library and scheme, in one table.

    python -m benchmarks.int8_accuracy [--quick] [--parts layers encoder decoder] [--text PATH ...] [--json FILE]

- Layers: one linear layer, 128 rows. Error: of the result against the product in float64 of what was not quantised,
  relative to its length. Inputs: normal ones, with which the time is taken; the same with a few channels 10 to 30 times
  as large; GELU of normal ones.
- Encoder: all-MiniLM-L6-v2, as benchmarks/sentence_encoder.py has it. Cosine of each sentence's embedding with that of
  the model in fp32, the mean and the least; time of a batch of 32 sentences.
- Decoder: SmolLM2-135M-Instruct, whose package has the weights in 4 bits: fp32 is what these stand for. Perplexity over
  windows of 512 tokens, and its change against fp32; time of a window, of which the head, quantised by none, is a part.

All quantise the same layers. The contestants take turns within one process; times are medians, with the speed-up over
fp32 as the median of the rounds' ratios. torchao is compiled, as its makers advise, unless --no-compile or --quick is
given.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import end_to_end, int8_models, peers, sentence_encoder
from benchmarks.family import OURS
from benchmarks.int8_models import FP32, Contestant
from llmkern.evaluation import machine
from llmkern.evaluation import timing as harness
from llmkern.evaluation.timing import Result, Spread, markdown, seconds

LAYERS = [(768, 3072), (4096, 4096)]  # (K, N)
ROWS = 128
WINDOW = 512
PARTS = ("layers", "encoder", "decoder")
Rows = dict[str, dict[str, Any]]  #: by contestant and column: a number, or a Spread where it is a time or a ratio


class Findings:
    """The columns with their formats, the numbers, and what a reader must know beside them."""

    def __init__(self, contestants: Iterable[str]) -> None:
        self.columns: dict[str, Callable[[Any], str]] = {}
        self.rows: Rows = {name: {} for name in contestants}
        self.notes: list[str] = []
        self.broken = False  #: one of llmkern's has failed

    def add(self, column: str, show: Callable[[Any], str], values: Mapping[str, Any]) -> None:
        self.columns[column] = show
        for name, value in values.items():
            self.rows[name][column] = value

    def add_times(self, part: str, result: Result, calls: int = 1) -> None:
        """Times of one of so many calls, and speed-ups, if fp32 has run."""
        times = {name: Spread(*(t / calls for t in result.time(name))) for name in result.names}
        self.add(f"{part}: time", lambda t: seconds(t.median), times)
        if result.baseline in result.samples:
            self.add(f"{part}: speed-up", lambda r: f"{r.median:.2f}", {n: result.ratio(n) for n in result.names})
        self.failures(part, result.failed)

    def failures(self, part: str, failed: Mapping[str, str]) -> None:
        self.notes += [f"{part}: {name} has no figure: {why}." for name, why in failed.items()]
        self.broken |= any(name.startswith(OURS) for name in failed)

    def table(self) -> str:
        lines = [["", *self.columns]]
        for name, row in self.rows.items():
            lines.append([name, *(show(row[c]) if c in row else "" for c, show in self.columns.items())])
        return markdown(lines)

    def to_json(self) -> dict[str, Any]:
        def plain(value: Any) -> Any:
            return value._asdict() if isinstance(value, Spread) else value

        return {name: {column: plain(value) for column, value in row.items()} for name, row in self.rows.items()}


class Bar:
    """How far it is, on stderr: a bar where tqdm is installed, else a line for each part."""

    def __init__(self, part: str, total: int) -> None:
        self.bar: Any = None
        try:
            from tqdm import tqdm
        except ImportError:
            print(f"{part} ...", file=sys.stderr, flush=True)
        else:
            self.bar = tqdm(total=total, desc=part, file=sys.stderr, leave=False)

    def __call__(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.close()


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and, if asked, writes. Returns the exit status, 1 where llmkern has failed."""
    about = (__doc__ or "").split("\n", 1)[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.int8_accuracy", description=about)
    parser.add_argument("--quick", action="store_true", help="one layer, few sentences and windows, nothing compiled")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all three")
    parser.add_argument("--match", default="", metavar="TEXT", help="only contestants whose name has this, and fp32")
    parser.add_argument("--text", nargs="+", type=Path, default=[], metavar="PATH", help="files, or folders with *.txt")
    parser.add_argument("--tokens", type=int, help="of the text, at most (default 20480, quick 1024)")
    parser.add_argument("--rounds", type=int, help="of layers and sentences (default 7, quick 2)")
    parser.add_argument("--no-compile", action="store_true", help="torchao step by step")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there as well")
    options = parser.parse_args(argv)
    rounds = options.rounds or (2 if options.quick else 7)
    count = (options.tokens or (1024 if options.quick else 20480)) // WINDOW
    if count < 1:
        parser.error(f"--tokens: expected at least {WINDOW}, got {options.tokens}")
    why = "not asked for" if options.quick or options.no_compile else peers.compile_missing()
    found, absent = int8_models.available()
    found = {n: c for n, c in found.items() if n == FP32 or options.match in n}
    findings = Findings(found)
    findings.notes += [f"{name}: {reason}." for name, reason in absent.items()]
    if any(c.compiled for c in found.values()):
        findings.notes.append(f"torchao is {'compiled' if not why else f'not compiled: {why}'}.")
    described = machine.describe()
    before = harness.busy(), time.perf_counter()
    if "layers" in options.parts:
        layers(findings, found, LAYERS[:1] if options.quick else LAYERS, rounds, not why)
    if "encoder" in options.parts:
        encoder(findings, found, 16 if options.quick else None, rounds, not why)
    if "decoder" in options.parts:
        try:
            model, tokenizer = int8_models.decoder()
            content, what = int8_models.text(options.text)
            rows = int8_models.windows(tokenizer, content, count, WINDOW)
        except (ImportError, OSError, ValueError) as error:
            findings.notes.append(f"decoder: left out: {error}.")
        else:
            findings.notes.append(f"decoder: {len(rows)} windows of {WINDOW} tokens from {what}.")
            decoder(findings, found, model, rows, not why)
    findings.notes += disturbance(*before)
    print(f"# int8_accuracy\n\n{machine.line(described)}\n\n{findings.table()}\n")
    print("\n".join(f"- {note}" for note in findings.notes))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        written = {"benchmark": "int8_accuracy", "machine": described, "notes": findings.notes}
        options.json.write_text(json.dumps({**written, "rows": findings.to_json()}, indent=1) + "\n")
        print(f"\nwritten: {options.json}")
    return 1 if findings.broken else 0


def disturbance(before: tuple[float, float] | None, start: float) -> list[str]:
    after, took = harness.busy(), time.perf_counter() - start
    if not before or not after:
        return []
    others = (after[0] - before[0]) - (after[1] - before[1])
    share = max(0.0, others) / (torch.get_num_threads() * took)
    return [f"Other processes used {share:.0%} of the cores meanwhile: the more they do, the less the times say."]


def relative(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm())


def inputs(k: int) -> dict[str, Tensor]:
    """Rows of K values of each sort."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, k, generator=generator)
    channels = torch.randperm(k, generator=generator)[: max(4, k // 200)]
    outliers = x.clone()
    outliers[:, channels] *= 20 * torch.rand(len(channels), generator=generator) + 10
    return {"normal": x, "outlier channels": outliers, "GELU": F.gelu(1.5 * x)}


def layers(
    findings: Findings, contestants: Mapping[str, Contestant], shapes: Sequence[tuple[int, int]], rounds: int,
    compiled: bool,
) -> None:  # fmt: skip
    with Bar("layers", len(shapes) * rounds) as step:
        for k, n in shapes:
            torch.compiler.reset()
            torch.manual_seed(0)
            linear = nn.Linear(k, n)
            linear.weight.copy_(torch.randn(n, k) / k**0.5)
            plain = nn.Sequential(linear).eval().requires_grad_(False)
            models, failed = int8_models.build(plain, contestants, ["0"], compiled)
            given = inputs(k)
            result = harness.measure(
                {name: partial(model, given["normal"]) for name, model in models.items()},
                baseline=FP32, rounds=rounds, progress=step,
            )  # fmt: skip
            result.failed.update(failed)
            for sort, x in given.items():
                truth = x.double() @ linear.weight.double().t() + linear.bias.double()
                errors = {name: relative(models[name](x), truth) for name in result.names}
                findings.add(f"{k} to {n}, {sort}", lambda e: f"{e:.1e}", errors)
            findings.add_times(f"{k} to {n}", result)


def encoder(
    findings: Findings, contestants: Mapping[str, Contestant], count: int | None, rounds: int, compiled: bool
) -> None:
    torch.compiler.reset()
    origin, why = sentence_encoder.source()
    batches = origin.batches(sentence_encoder.sentences(count), end_to_end.BATCH)
    plain = origin.model(False).requires_grad_(False)
    names, left = int8_models.quantised_names(plain)
    findings.notes.append(f"encoder: {origin.name}{f' ({why})' if why else ''}; {quantised(names, left)}.")
    models, failed = int8_models.build(plain, contestants, names, compiled)
    with Bar("encoder", rounds) as step:
        result = harness.measure(
            {name: partial(run, model, batches) for name, model in models.items()},
            baseline=FP32, rounds=rounds, sample_seconds=0, warmup=1, progress=step,
        )  # fmt: skip
    result.failed.update(failed)
    original = end_to_end.embed(run(plain, batches), batches)
    alike = {
        name: sentence_encoder.cosine(end_to_end.embed(run(models[name], batches), batches), original)
        for name in result.names
    }
    findings.add("MiniLM: cosine, mean", lambda c: f"{c:.5f}", {n: float(c.mean()) for n, c in alike.items()})
    findings.add("MiniLM: cosine, least", lambda c: f"{c:.5f}", {n: float(c.min()) for n, c in alike.items()})
    findings.add_times("MiniLM", result, len(batches))


def quantised(names: Sequence[str], left: Sequence[str]) -> str:
    named = ", ".join(left) if len(left) < 4 else f"{len(left)}, {left[0]} and others"
    return f"all quantise {len(names)} of its linear layers and leave {named or 'none'}"


def run(model: nn.Module, batches: Sequence[sentence_encoder.Batch]) -> list[Tensor]:
    return [model(*batch) for batch in batches]


def decoder(
    findings: Findings, contestants: Mapping[str, Contestant], plain: nn.Module, rows: Tensor, compiled: bool
) -> None:
    """Perplexities and times come of the same calls: each window goes through all contestants in a new order."""
    torch.compiler.reset()
    names, left = int8_models.quantised_names(plain)
    findings.notes.append(f"decoder: {quantised(names, left)}.")
    models, failed = int8_models.build(plain, contestants, names, compiled)
    result = Result(FP32, {name: [] for name in models}, dict.fromkeys(models, 1), failed)
    total = dict.fromkeys(models, 0.0)
    order, shuffle = list(models), random.Random(0).shuffle
    with Bar("decoder", (len(rows) + 1) * len(models)) as step:
        for i in range(-1, len(rows)):  # the first is a warm-up
            row = rows[max(i, 0)][None]
            shuffle(order)
            for name in list(order):
                out: list[Tensor] = []
                try:
                    took = harness.sample(partial(forward, models[name], row, out), 1)
                except Exception as error:  # whatever a library raises is its result
                    failed[name] = int8_models.reason(error)
                    order.remove(name)
                    del result.samples[name], total[name]
                    continue
                if i >= 0:
                    result.samples[name].append(took)
                    total[name] += int8_models.loss(out[0], row)
                step()
    found = {name: math.exp(total[name] / rows[:, 1:].numel()) for name in total}
    findings.add("SmolLM2: perplexity", lambda p: f"{p:.2f}", found)
    if FP32 in found:
        change = {name: p / found[FP32] - 1 for name, p in found.items()}
        findings.add("SmolLM2: change", lambda c: f"{c:+.2%}", change)
    findings.add_times("SmolLM2", result)


def forward(model: nn.Module, row: Tensor, out: list[Tensor]) -> None:
    out.append(model(row, use_cache=False).logits)


if __name__ == "__main__":
    sys.exit(main())
