"""The time of a training step of BERT-base's shape: `python -m benchmarks.training`.

    python -m benchmarks.training [--quick] [--batch 4] [--length 512] [--precision float32] [--dropout 0.1]
        [--padding 0] [--rounds 5] [--match REGEX] [--profile] [--output FOLDER]

Masked language modelling with 15 % of the tokens to be found; forward, backward, clipping and AdamW (torch's fused
one) by the same trainer, on the same batch. The contestants alternate within one process.

- torch: the same model in plain PyTorch, with F.scaled_dot_product_attention, and logits of every token.
- torch, logits of labelled tokens: as above, but the head sees only the tokens that have a label, as ours does.
- llmkern: the model on llmkern's kernels.

--padding: the share of the tokens that is padding, in rows of mixed lengths. --profile prints where the time of each
goes by operator (torch.profiler).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.family import RESULTS, slug
from llmkern.evaluation import machine
from llmkern.evaluation.timing import measure
from llmkern.training import MixedPrecisionTrainer, PretrainingConfig, build_model
from llmkern.training.base import PretrainingModel
from llmkern.training.objectives.collate import IGNORED

BASELINE = "torch"
GATHERED = "torch, logits of labelled tokens"
OURS = "llmkern"


def main(argv: Sequence[str] | None = None) -> int:
    """Compares, prints and writes. Returns 1 where llmkern's has failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training", description=(__doc__ or "").split("\n", 1)[0]
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model, two rounds: whether it runs at all")
    parser.add_argument("--batch", type=int, default=4, help="sequences (default %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens of each (default %(default)s)")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--dropout", type=float, default=0.1, help="default %(default)s")
    parser.add_argument("--padding", type=float, default=0.0, help="share of the tokens (default %(default)s)")
    parser.add_argument("--rounds", type=int, help="default 5, quick 2")
    parser.add_argument("--match", default="", metavar="REGEX", help=f"these contestants alone, and {BASELINE}")
    parser.add_argument("--profile", action="store_true", help="where the time of each goes")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER", help="default benchmarks/results")
    options = parser.parse_args(argv)
    for name in ("batch", "length"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    if not 0.0 <= options.padding < 1.0:
        parser.error(f"--padding: expected a share in [0, 1), got {options.padding}")
    steps = {
        name: step
        for name, step in contestants(options).items()
        if name == BASELINE or re.search(options.match, name)
    }  # fmt: skip
    described = machine.describe()
    rounds = (2 if options.quick else 5) if options.rounds is None else options.rounds
    result = measure(steps, baseline=BASELINE, rounds=rounds, sample_seconds=0.0, warmup=0)
    command = f"python -m benchmarks.training {' '.join(sys.argv[1:] if argv is None else argv)}".strip()
    text = f"`{command}`. {machine.line(described)}.\n\n{result.table()}"
    if options.profile:
        text += "".join(f"\n\n{name}:\n\n```\n{profile(step)}\n```" for name, step in steps.items())
    print(text)
    path = options.output / f"training-{slug(described['processor'])}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": described, "command": command, "found": result.to_json()}, indent=1))
    path.with_suffix(".md").write_text(text + "\n")
    print(f"\nwritten: {path}, {path.with_suffix('.md')}")
    return int(OURS in result.failed)


def contestants(options: argparse.Namespace) -> dict[str, Callable[[], float]]:
    """One step of each, by name."""
    shape: dict[str, Any] = dict(max_position_embeddings=max(options.length, 1), max_seq_length=options.length)
    if options.quick:
        shape |= dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=500)
    batch = batch_of(options, shape.get("vocab_size", 30522))

    def step(fused: bool, gathered: bool = False) -> Callable[[], float]:
        trainer: list[MixedPrecisionTrainer] = []

        def run() -> float:
            if not trainer:  # within the warm-up, so that a model that is not asked for takes no memory
                config = PretrainingConfig(fused=fused, dropout=options.dropout, **shape)
                model = build_model(config)
                if gathered:
                    model._loss = types.MethodType(loss_of_labelled, model)  # type: ignore[method-assign]
                trainer.append(MixedPrecisionTrainer(model, config=config, precision=options.precision))
            return trainer[0].train_step(batch)

        return run

    return {BASELINE: step(False), GATHERED: step(False, gathered=True), OURS: step(True)}


def loss_of_labelled(model: PretrainingModel, hidden: Tensor, here: Any, targets: Tensor) -> Tensor:
    """The plain model's loss without logits that nobody asks for."""
    rows, wanted = model.predicting(hidden, here, targets)
    return F.cross_entropy(F.linear(rows, *model.output()).float(), wanted, ignore_index=IGNORED)


def batch_of(options: argparse.Namespace, vocabulary: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch, options.length)
    tokens = torch.randint(vocabulary, shape, generator=generator)
    # Lengths spread evenly about the mean, the longest first.
    spread = torch.linspace(1.0, -1.0, options.batch) if options.batch > 1 else torch.zeros(1)
    width = min(options.padding, 1.0 - options.padding)
    lengths = ((1.0 - options.padding + width * spread) * options.length).round().clamp(1, options.length)
    seen = torch.arange(options.length) < lengths[:, None]
    asked = (torch.rand(shape, generator=generator) < 0.15) & seen
    return {
        "input_ids": tokens, "attention_mask": seen.long(), "labels": tokens.masked_fill(~asked, IGNORED),
    }  # fmt: skip


def profile(step: Callable[[], float]) -> str:
    """The operators of one step, those that take most first."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        step()
    table: str = found.key_averages().table(sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=40)
    return short(table)


def short(table: str) -> str:
    """Of torch's table the operator, its own share and time, and how often it was called."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()]
    rows = [(r[0], r[1], r[2], r[-1]) for r in lines if len(r) >= 6]
    return "\n".join(f"{a:<40} {b:>12} {c:>12} {d:>12}" for a, b, c, d in rows)


if __name__ == "__main__":
    sys.exit(main())
