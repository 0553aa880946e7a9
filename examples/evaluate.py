"""What a language model loses and gains on llmkern and in int8: perplexity, speed, memory, the cost of tokens.

python -m examples.evaluate                                   # a model of bytes, trained here on --text
python -m examples.evaluate --model FOLDER --text FILE --cost-per-hour 1.20
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from typing import Any

import torch

import llmkern
from examples.common import add_model_arguments, language_model, positive
from llmkern.evaluation import MachineCost, ModelEvaluator, cost_per_million_tokens, measure_efficiency


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--windows", type=positive, default=16, help="of text that count (default %(default)s)")
    parser.add_argument("--window", type=positive, default=256, help="tokens of each (default %(default)s)")
    parser.add_argument("--prompt-tokens", type=positive, default=128, help="of a prefill (default %(default)s)")
    parser.add_argument("--rounds", type=positive, default=21, help="of the measurement (default %(default)s)")
    parser.add_argument("--cost-per-hour", type=float, default=1.0, help="of this machine (default %(default)s)")
    options = parser.parse_args(arguments)
    try:
        machine = MachineCost(options.cost_per_hour)
    except ValueError as error:
        parser.error(f"--cost-per-hour: {error}")
    if options.window < 2:
        parser.error("--window: expected at least 2 tokens, of which the second is predicted, got 1")

    found = language_model(options)
    models: dict[str, Any] = {"fp32": found.model.eval(), "llmkern": copy.deepcopy(found.model)}
    llmkern.kernelize(models["llmkern"])
    models["int8"] = copy.deepcopy(models["llmkern"])
    llmkern.quantize_model(models["int8"], skip=("lm_head",), measure=False)

    tokens = found.encode(options.text)[: options.windows * options.window]
    rows = [{"input_ids": row[None]} for row in tokens.split(options.window)]
    for name, model in models.items():
        print(f"{name:<9}perplexity {ModelEvaluator(model).evaluate_perplexity(rows):.4f} on {len(tokens)} tokens")

    try:
        efficiency = measure_efficiency(
            models, prompt_tokens=options.prompt_tokens, rounds=options.rounds, phases=("prefill", "decode")
        )
    except ValueError as error:  # more tokens than the model has room for
        parser.error(str(error))
    for phase in ("prefill", "decode"):
        for name, one in efficiency.items():
            if phase in one.failed:
                print(f"{name:<9}{phase}: {one.failed[phase]}")
                continue
            p = one.phases[phase]
            cost = cost_per_million_tokens(machine, p.tokens_per_second)
            print(
                f"{name:<9}{phase}: {p.latency_median * 1e3:.2f} ms, {p.tokens_per_second:.0f} tokens/s, "
                f"{p.speedup.median:.2f} times as fast ({p.speedup.low:.2f} to {p.speedup.high:.2f}), "
                f"{p.flops / 1e6:.1f} MFLOP; a million tokens cost {cost:.3g} at full use"
            )

    with llmkern.monitoring.watch() as counts, torch.no_grad():
        models["llmkern"].generate(rows[0]["input_ids"][:, :16], max_new_tokens=8, do_sample=False)
    print("\nWhat served eight tokens of the kernelized model:")
    print(counts.table())


if __name__ == "__main__":
    main()
