"""What llmkern.recommend estimates, beside what whole models take: `python -m benchmarks.recommend`.

    python -m benchmarks.recommend [--quick] [--rounds 11] [--match REGEX] [--output FOLDER]

Models of transformers with random weights, kernelized, in float32, bfloat16 and int8: a pass over a prompt, and one
more token. The rates of the machine are measured before each model, in the same process. What is estimated and what was
measured goes to a file, of which tests/evaluation/measured.json is one: the tests hold the estimates to it.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import llmkern
from benchmarks.family import RESULTS, progress, slug
from llmkern.evaluation import machine, machines, timing
from llmkern.evaluation.recommend import Machine, Shape, estimate


@dataclass(frozen=True)
class Case:
    """A model, and what it is given: prompts of so many tokens, `batch` of them together."""

    task: str
    make: Callable[[], Any]
    prompts: tuple[int, ...] = (32, 256)
    batch: int = 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recommend", description=(__doc__ or "").split("\n", 1)[0]
    )
    parser.add_argument("--quick", action="store_true", help="small models, three rounds")
    parser.add_argument("--rounds", type=int, help="default 11, quick 3")
    parser.add_argument("--match", default="", metavar="REGEX", help="these models alone")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER", help="default benchmarks/results")
    options = parser.parse_args(argv)
    rounds = (3 if options.quick else 11) if options.rounds is None else options.rounds
    if rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {rounds}")
    names = [n for n in MODELS if re.search(options.match, n) and (not options.quick or n in QUICK)]
    described, runs = machine.describe(), []
    bar = progress(sum(len(MODELS[n].prompts) for n in names))
    for name in names:
        bar.start(name)
        runs += compare(name, rounds, bar.step)
    bar.close()
    command = " ".join(["python -m benchmarks.recommend", *(argv if argv is not None else sys.argv[1:])])
    print(f"`{command}`. {machine.line(described)}.\n\n{table(runs)}\n\n{summary(runs)}")
    path = options.output / f"recommend-{slug(described['processor'])}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": described, "command": command, "runs": runs}, indent=1) + "\n")
    print(f"\nwritten: {path}")
    return 0


def compare(name: str, rounds: int, step: Callable[[], Any]) -> list[dict[str, Any]]:
    """A model's runs, one for each prompt: the machine then, and each scheme's passes, estimated and measured."""
    case = MODELS[name]
    torch.manual_seed(0)
    plain = case.make().eval()
    shape = Shape.of(plain.config, case.task)
    models, new = schemes(plain, shape), 0 if case.task == "encoder" else rounds
    found: list[dict[str, Any]] = []
    for prompt in case.prompts:
        machines._measured.cache_clear()  # what others do on the machine now is in both figures
        here = Machine.here("cpu")
        with torch.inference_mode(False), torch.no_grad():
            calls = {f"{scheme} {part}": call for scheme, m in models.items() for part, call in passes(m, case, prompt)}
            result = timing.measure(calls, rounds=rounds)
        guesses = {scheme: estimate(scheme, shape, here, case.batch, prompt, new) for scheme in models}
        rows = []
        for label in calls:
            scheme, part = label.split()
            expected = vars(guesses[scheme])[part]
            measured = result.time(label)
            rows.append({
                "scheme": scheme, "pass": part, "estimated": expected.seconds, "bound": expected.bound,
                "measured": measured.median, "low": measured.low, "high": measured.high,
            })  # fmt: skip
        found.append({
            "model": name, "shape": asdict(shape), "machine": asdict(here), "batch": case.batch, "prompt": prompt,
            "new": new, "passes": rows,
        })  # fmt: skip
        step()
    return found


def schemes(plain: Any, shape: Shape) -> dict[str, Any]:
    """A model as `llmkern.recommend` proposes it. The output's matrix stays as it is in int8."""
    float32 = copy.deepcopy(plain)
    llmkern.kernelize(float32)
    bfloat16 = copy.deepcopy(plain).bfloat16()
    llmkern.kernelize(bfloat16)
    found = {"float32": float32, "bfloat16": bfloat16}
    if shape.linear:
        found["int8"] = copy.deepcopy(float32)
        head = ["lm_head"] if hasattr(plain, "lm_head") else []
        llmkern.quantize_model(found["int8"], skip=head, measure=False, progress=False)
    return found


def passes(model: Any, case: Case, prompt: int) -> list[tuple[str, Callable[[], Any]]]:
    """The calls that are timed: a prompt's pass, and one more token on a cache that grows from call to call."""
    ids = torch.randint(100, (case.batch, prompt), generator=torch.Generator().manual_seed(0))
    if case.task == "encoder":
        return [("prompt", lambda: model(input_ids=ids))]
    if case.task == "decoder":
        cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        return [
            ("prompt", lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1)),
            ("token", lambda: model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)),
        ]
    encoder, start = model.get_encoder(), ids[:, :1]
    read = encoder(input_ids=ids)
    pairs = model(encoder_outputs=read, decoder_input_ids=start, use_cache=True).past_key_values
    return [
        ("prompt", lambda: encoder(input_ids=ids)),
        (
            "token",
            lambda: model(encoder_outputs=read, decoder_input_ids=start, past_key_values=pairs, use_cache=True),
        ),
    ]


def table(runs: list[dict[str, Any]]) -> str:
    lines = [
        ["model", "prompt", "pass", "scheme", "estimated", "measured", "20 to 80 %", "estimated / measured", "bound by"]
    ]
    for run in runs:
        for r in run["passes"]:
            lines.append([
                run["model"], str(run["prompt"]), r["pass"], r["scheme"], timing.seconds(r["estimated"]),
                timing.seconds(r["measured"]), f"{timing.seconds(r['low'])} to {timing.seconds(r['high'])}",
                f"{r['estimated'] / r['measured']:.2f}", r["bound"],
            ])  # fmt: skip
    return timing.markdown(lines)


def summary(runs: list[dict[str, Any]]) -> str:
    ratios = sorted(r["estimated"] / r["measured"] for run in runs for r in run["passes"])
    off, spread = max(1 / ratios[0], ratios[-1], 1.0), timing.Spread.of(ratios)
    return (
        f"Estimated over measured: median {spread.median:.2f} ({spread.low:.2f} to {spread.high:.2f}), "
        f"{ratios[0]:.2f} to {ratios[-1]:.2f} in all: {off:.2f} times off at most; {machines.ERROR:g} is stated."
    )


def _bert(layers: int, hidden: int) -> Any:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(
        num_hidden_layers=layers, hidden_size=hidden, intermediate_size=4 * hidden, num_attention_heads=hidden // 64,
    ))  # fmt: skip


def _llama(layers: int, hidden: int, inner: int, kv_heads: int, vocab: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        num_hidden_layers=layers, hidden_size=hidden, intermediate_size=inner, num_attention_heads=hidden // 64,
        num_key_value_heads=kv_heads, vocab_size=vocab, max_position_embeddings=1024, tie_word_embeddings=True,
    ))  # fmt: skip


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config())


def _bart(layers: int, hidden: int) -> Any:
    from transformers import BartConfig, BartForConditionalGeneration

    return BartForConditionalGeneration(BartConfig(
        encoder_layers=layers, decoder_layers=layers, d_model=hidden, encoder_ffn_dim=4 * hidden,
        decoder_ffn_dim=4 * hidden, encoder_attention_heads=hidden // 64, decoder_attention_heads=hidden // 64,
    ))  # fmt: skip


MODELS: dict[str, Case] = {
    "encoder of 22 M (MiniLM's shape)": Case("encoder", lambda: _bert(6, 384)),
    "encoder of 109 M (BERT-base's)": Case("encoder", lambda: _bert(12, 768)),
    "encoder of 27 M, thin and deep": Case("encoder", lambda: _bert(24, 256), (16, 128)),
    "encoder of 22 M, batches of 8": Case("encoder", lambda: _bert(6, 384), batch=8),
    "decoder of 55 M": Case("decoder", lambda: _llama(12, 512, 1408, 8, 32000)),
    "decoder of 55 M, batches of 8": Case("decoder", lambda: _llama(12, 512, 1408, 8, 32000), batch=8),
    "decoder of 135 M (SmolLM2's)": Case("decoder", lambda: _llama(30, 576, 1536, 3, 49152)),
    "decoder of 360 M (SmolLM2's)": Case("decoder", lambda: _llama(32, 960, 2560, 5, 49152)),
    "decoder of 124 M (GPT-2's)": Case("decoder", _gpt2),
    "encoder-decoder of 70 M": Case("encoder-decoder", lambda: _bart(6, 512)),
    "encoder-decoder of 105 M, batches of 4": Case("encoder-decoder", lambda: _bart(4, 768), (64,), batch=4),
}
QUICK = ("encoder of 22 M (MiniLM's shape)",)


if __name__ == "__main__":
    sys.exit(main())
