"""A real trained sentence encoder as published and with llmkern: time, memory, accuracy, in one table.

    python -m benchmarks.end_to_end [--output FOLDER] [--quick] [--offline]

Writes end_to_end.md (the table), .png (a plot, where matplotlib is installed) and .json into the folder.

- Time per batch: all batches run one after the other, the contestants in turns within one process; median, 20th and
  80th percentile over the rounds. The speed-up is the median of the ratios of each round.
- No padding: the same sentences laid end to end, so that no layer works on padding
  (llmkern.models.transformers.without_padding). The rows before do all the work that the published model does.
- Peak memory: each contestant in a process of its own, the peak while it runs all batches, less what the process used
  before the model was there (Python and the imported libraries).
- Largest error: of the last hidden states at real tokens, against the published model computed in float64.
- Contract: llmkern.verify on the first batch, against the same model in the same precision in plain PyTorch. Int8 is
  another model by design: what it does to the sentences is in the last three columns.
- Cosine and neighbours: each sentence's embedding against that of the published model.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import llmkern
from benchmarks.sentence_encoder import Batch, Source, cosine, embeddings, neighbours_kept, sentences, source
from llmkern import extension
from llmkern.evaluation import machine
from llmkern.evaluation.memory import release, resident
from llmkern.evaluation.timing import Result, Spread, markdown, measure, seconds

BATCH = 32
COLUMNS = (
    "", "time per batch", "20 to 80 %", "speed-up", "20 to 80 %", "peak memory", "largest error", "contract",
    "cosine, mean", "cosine, least", "5 nearest kept",
)  # fmt: skip


@dataclass(frozen=True)
class Contestant:
    name: str
    fused: bool = False
    dtype: torch.dtype = torch.float32
    int8: bool = False
    packed: bool = False

    @property
    def has_contract(self) -> bool:
        """Int8 changes the model: the layer is held to the contract by its own tests, the whole by its embeddings."""
        return self.fused and not self.int8

    def build(self, origin: Source, device: str) -> nn.Module:
        model = origin.model(self.fused, self.packed)
        if self.int8:
            model = llmkern.quantize_model(model)
        return model.to(device, self.dtype)

    def plain(self, origin: Source, device: str) -> nn.Module:
        """The same model in the same precision, in plain PyTorch: the reference of the contract."""
        return origin.model(False).to(device, self.dtype)


PUBLISHED = Contestant("torch fp32, as published")


def contestants(device: str) -> list[Contestant]:
    """Those that make sense on this machine; bf16 only where the processor multiplies it in hardware."""
    entries = [PUBLISHED, Contestant("llmkern fp32", True)]
    if device == "cuda" or has_bf16():
        entries += [Contestant("torch bf16", False, torch.bfloat16), Contestant("llmkern bf16", True, torch.bfloat16)]
    entries.append(Contestant("llmkern int8", True, int8=True))
    packed = [replace(e, name=f"{e.name}, no padding", packed=True) for e in entries if e.fused]
    return entries + packed


def has_bf16() -> bool:
    """Whether this processor has AVX-512 BF16, without which the library chooses another instruction set."""
    return extension._C is not None and extension._C.active_isa() == "avx512"


def run(model: nn.Module, batches: list[Batch], after_batch: Callable[[], Any] = lambda: None) -> list[Tensor]:
    with torch.inference_mode():
        outputs = []
        for batch in batches:
            outputs.append(model(*batch))
            after_batch()
        return outputs


def peak_memory(contestant: Contestant, origin: Source, batches: list[Batch], device: str) -> int:
    """Bytes at the peak of running all batches above those before the model was made; not the peak of making it."""
    if device == "cuda":
        gc.collect()
        before = torch.cuda.memory_allocated()
        model = contestant.build(origin, device)
        torch.cuda.reset_peak_memory_stats()
        for batch in batches:
            run(model, [batch.to(device)])
        return torch.cuda.max_memory_allocated() - before
    release()
    before = resident("VmRSS")
    model = contestant.build(origin, device)
    release()
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is used now
    for batch in batches:
        run(model, [batch])
    return resident("VmHWM") - before


def _report_peak(pipe: Any, *args: Any) -> None:
    try:
        pipe.send(peak_memory(*args))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


def peak_memory_apart(contestant: Contestant, origin: Source, batches: list[Batch]) -> int | None:
    """The same in a process of its own, on the CPU; None where the system does not tell.

    To be called before this process has computed anything: a fork does not take the threads of a pool along.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    context = multiprocessing.get_context("fork")  # the imports are shared, and count for no contestant
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_report_peak, args=(sender, contestant, origin, batches, "cpu"))
    child.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        result = "the process ended"
    child.join()
    if isinstance(result, str):
        raise RuntimeError(f"{contestant.name}: its memory could not be measured: {result}")
    return int(result)


def contract(contestant: Contestant, model: nn.Module, origin: Source, batch: Batch, device: str) -> dict[str, Any]:
    """What llmkern.verify says of the hidden states at real tokens; at padding, implementations differ rightly."""

    def seen(module: nn.Module) -> nn.Module:
        return _AtTokens(module).eval()

    report = llmkern.verify(seen(model), seen(contestant.plain(origin, device)), tuple(batch), gradients=False)
    row = report.rows[0]
    return {
        "passed": report.passed,
        "error": row.max_error,
        "error_of_plain": row.max_reference,
        "allowed": row.max_allowed,
        "reason": row.reason,
    }


class _AtTokens(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden: Tensor = self.model(input_ids, attention_mask)[attention_mask.bool()]
        return hidden


def largest_error(outputs: list[Tensor], truth: list[Tensor], batches: list[Batch]) -> float:
    """The largest distance at real tokens."""
    pairs = zip(outputs, truth, batches, strict=True)
    return max((o.double() - t)[b.attention_mask.bool()].abs().max().item() for o, t, b in pairs)


def embed(outputs: list[Tensor], batches: list[Batch]) -> Tensor:
    """(N, W) float32 on the CPU, a row for each sentence."""
    pairs = zip(outputs, batches, strict=True)
    return torch.cat([embeddings(o.float(), b.attention_mask) for o, b in pairs]).cpu()


class Progress:
    """One line that counts up, on stderr; whole lines where that is no terminal."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done, self.shown = what, total, 0, 0

    def __call__(self) -> None:
        self.done += 1
        percent = 100 * self.done // self.total
        if sys.stderr.isatty():
            print(f"\r{self.what}: {percent} %", end="\n" if self.done == self.total else "", file=sys.stderr)
        elif percent >= self.shown + 25 or self.done == self.total:
            self.shown = percent
            print(f"{self.what}: {percent} %", file=sys.stderr)
        sys.stderr.flush()


def accuracy(
    entries: list[Contestant], models: dict[str, nn.Module], origin: Source, batches: list[Batch], device: str
) -> dict[str, dict[str, Any]]:
    truth = run(PUBLISHED.plain(origin, device).double(), batches)
    original = embed(run(models[PUBLISHED.name], batches), batches)
    rows: dict[str, dict[str, Any]] = {}
    step = Progress("accuracy", len(entries))
    for entry in entries:
        outputs = run(models[entry.name], batches)
        own = embed(outputs, batches)
        alike = cosine(own, original)
        rows[entry.name] = {
            "largest_error": largest_error(outputs, truth, batches),
            "cosine_mean": alike.mean().item(),
            "cosine_least": alike.min().item(),
            "neighbours_kept": neighbours_kept(own, original),
            "contract": contract(entry, models[entry.name], origin, batches[0], device) if entry.has_contract else None,
        }
        step()
    return rows


def table(result: Result, count: int, memory: dict[str, int | None], rows: dict[str, dict[str, Any]]) -> str:
    lines = [list(COLUMNS)]
    for name in result.names:
        t, ratio, row = result.time(name), result.ratio(name), rows[name]
        peak, verdict = memory[name], row["contract"]
        lines.append([
            name,
            seconds(t.median / count),
            f"{seconds(t.low / count)} to {seconds(t.high / count)}",
            f"{ratio.median:.2f}",
            f"{ratio.low:.2f} to {ratio.high:.2f}",
            f"{peak / 2**20:.0f} MiB" if peak is not None else "not told",
            f"{row['largest_error']:.1e}",
            "" if verdict is None else "kept" if verdict["passed"] else "not kept",
            f"{row['cosine_mean']:.5f}",
            f"{row['cosine_least']:.5f}",
            f"{row['neighbours_kept']:.1%}",
        ])  # fmt: skip
    lines += [[name, f"not run: {why}", *[""] * (len(COLUMNS) - 2)] for name, why in result.failed.items()]
    return markdown(lines)


def plot(path: Path, result: Result, count: int, memory: dict[str, int | None], title: str) -> bool:
    """Draws time and memory; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names, times = result.names, [result.time(name) for name in result.names]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 0.55 * len(names) + 1.8), sharey=True)
    scale = 1e3 / count
    middle = [t.median * scale for t in times]
    spread = [[(t.median - t.low) * scale for t in times], [(t.high - t.median) * scale for t in times]]
    bars = left.barh(
        names, middle, xerr=spread, color=["#8a8a8a" if n.startswith("torch") else "#2b6cb0" for n in names]
    )
    left.bar_label(bars, [f" {result.ratio(n).median:.2f}x" for n in names], padding=4)
    left.set_xlabel("ms per batch, with the speed-up (less is better)")
    left.margins(x=0.18)
    left.invert_yaxis()
    bars = right.barh(names, [(memory[n] or 0) / 2**20 for n in names], color=[b.get_facecolor() for b in bars])
    right.bar_label(bars, [f"{(memory[n] or 0) / 2**20:.0f}" for n in names], padding=4)
    right.set_xlabel("MiB at the peak (less is better)")
    right.margins(x=0.12)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("output"), help="the folder to write to (output)")
    parser.add_argument("--quick", action="store_true", help="few sentences and rounds: does it run at all?")
    parser.add_argument("--offline", action="store_true", help="a seeded model of the same shape")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    origin, why = source(options.offline)
    texts = sentences(8 if options.quick else None)
    size, rounds = (4, 1) if options.quick else (BATCH, 11)
    batches = origin.batches(texts, size)
    entries = contestants(device)
    tokens = sum(int(b.attention_mask.sum()) for b in batches)
    padding = 1 - tokens / sum(b.input_ids.numel() for b in batches)
    heading = [f"Model: {origin.name}."] + ([f"Why: {why}."] if why else [])
    heading.append(
        f"{len(texts)} sentences in {len(batches)} batches of {size}, {tokens} tokens, {padding:.0%} of the batches is "
        f"padding. {machine.line(machine.describe())}."
    )
    print(*heading, sep="\n", file=sys.stderr)

    memory: dict[str, int | None] = {}
    step = Progress("memory", len(entries))
    for entry in entries:
        if device == "cpu":
            memory[entry.name] = peak_memory_apart(entry, origin, batches)
        else:
            memory[entry.name] = peak_memory(entry, origin, batches, device)
        step()
    batches = [b.to(device) for b in batches]
    models = {entry.name: entry.build(origin, device) for entry in entries}
    rows = accuracy(entries, models, origin, batches, device)
    warmup = 1
    step = Progress("time", len(entries) * len(batches) * (warmup + 2 + rounds))

    def timed(model: nn.Module) -> Callable[[], Any]:
        return lambda: run(model, batches, step)

    result = measure(
        {name: timed(model) for name, model in models.items()}, rounds=rounds, sample_seconds=0, warmup=warmup
    )
    text = table(result, len(batches), memory, rows)
    print(text)
    if result.disturbance:
        others = Spread.of(result.disturbance).median
        heading.append(f"While timing, other processes used {others:.0%} of the processor.")
        print(heading[-1], file=sys.stderr)
    for name, row in rows.items():
        if row["contract"] and not row["contract"]["passed"]:
            print(f"{name}: {row['contract']['reason']}", file=sys.stderr)

    output: Path = options.output
    notes = __doc__[__doc__.index("- Time per batch") :].strip()
    output.joinpath("end_to_end.md").write_text("\n\n".join([*heading, text, notes]) + "\n", encoding="utf-8")
    report = {
        "machine": machine.describe(),
        "model": origin.name,
        "seeded_because": why or None,
        "sentences": len(texts),
        "batch_size": size,
        "tokens": tokens,
        "padding": padding,
        "contestants": {e.name: {**asdict(e), "dtype": str(e.dtype).removeprefix("torch.")} for e in entries},
        "peak_bytes": memory,
        "accuracy": rows,
        "seconds_of_all_batches": result.to_json(),
    }
    output.joinpath("end_to_end.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    written = ["end_to_end.md", "end_to_end.json"]
    if plot(output / "end_to_end.png", result, len(batches), memory, heading[0]):
        written.append("end_to_end.png")
    else:
        print("No plot: matplotlib is not installed.", file=sys.stderr)
    print(f"Written to {output}: {', '.join(written)}", file=sys.stderr)


if __name__ == "__main__":
    main()
