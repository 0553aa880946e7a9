"""One engine that continues text, in a process of its own: what benchmarks/decoder.py starts.

    python -m benchmarks.decoder_contestants NAME FOLDER PROMPT NEW SAMPLES

FOLDER holds what benchmarks.decoder made: the model, a GGUF of it and the ids of the text. Prints one line of JSON.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

GGUF, TOKENS = "model-q8_0.gguf", "tokens.pt"
WINDOW = 512  #: tokens of which each is predicted from those before it


class Engine(Protocol):
    def continued(self, ids: Sequence[int], count: int) -> list[int]:
        """The `count` tokens, never fewer, that greedy decoding puts behind the prompt."""

    def loss(self, ids: Sequence[int]) -> float | None:
        """The sum of -ln p of each id but the first; None where the library does not give it."""


class Transformers:
    """transformers' own generate. change: what is done to the model; options: of generate; load: of from_pretrained."""

    def __init__(self, folder: Path, change: Callable[[Any], Any] = lambda m: None, load: Any = None, **options: Any):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, **({"dtype": torch.float32} | (load or {}))).eval()
        self.options = options
        change(self.model)

    @torch.no_grad()
    def continued(self, ids: Sequence[int], count: int) -> list[int]:
        given = torch.tensor([ids])
        out = self.model.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, min_new_tokens=count, max_new_tokens=count,
            **self.options,
        )  # fmt: skip
        return out[0, len(ids) :].tolist()

    @torch.no_grad()
    def loss(self, ids: Sequence[int]) -> float:
        row = torch.tensor([ids])
        logits = self.model(row).logits[0, :-1].float()
        return float(torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum"))


def kernels(model: Any) -> None:
    import llmkern

    llmkern.kernelize(model)


def kernels_int8(model: Any, **scheme: Any) -> None:
    """The head too, which shares its weight with the embedding: as in the GGUF, both exist then."""
    import llmkern
    from llmkern.int8.scheme import Int8Scheme

    llmkern.kernelize(model)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
    llmkern.quantize_model(model, scheme=Int8Scheme(**scheme), measure=False, progress=False)


class LlamaCpp:
    def __init__(self, folder: Path):
        import llama_cpp

        threads = torch.get_num_threads()
        self.model = llama_cpp.Llama(
            str(folder / GGUF), n_ctx=2 * WINDOW, n_batch=WINDOW, n_threads=threads, n_threads_batch=threads,
            logits_all=False, verbose=False,
        )  # fmt: skip
        self.scored = llama_cpp.Llama(
            str(folder / GGUF), n_ctx=WINDOW, n_batch=WINDOW, n_threads=threads, n_threads_batch=threads,
            logits_all=True, verbose=False,
        )  # fmt: skip

    def continued(self, ids: Sequence[int], count: int) -> list[int]:
        self.model.reset()
        found = []
        for token in self.model.generate(ids, temp=0.0, repeat_penalty=1.0):
            found.append(token)
            if len(found) == count:
                return found
        raise RuntimeError("it ended before the last token")

    def loss(self, ids: Sequence[int]) -> float:
        self.scored.reset()
        self.scored.eval(ids)
        logits = torch.from_numpy(self.scored.scores[: len(ids) - 1]).float()
        return float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))


class OpenVino:
    """Weights in int8 by the GGUF; its pipeline gives no logits."""

    def __init__(self, folder: Path):
        import openvino_genai

        self.genai = openvino_genai
        threads = torch.get_num_threads()
        self.model = openvino_genai.LLMPipeline(str(folder / GGUF), "CPU", INFERENCE_NUM_THREADS=threads)

    def continued(self, ids: Sequence[int], count: int) -> list[int]:
        import numpy
        import openvino

        row = numpy.array([ids], dtype=numpy.int64)
        given = self.genai.TokenizedInputs(openvino.Tensor(row), openvino.Tensor(numpy.ones_like(row)))
        options = self.genai.GenerationConfig(
            max_new_tokens=count, min_new_tokens=count, ignore_eos=True, do_sample=False
        )
        return list(self.model.generate(given, options).tokens[0])

    def loss(self, ids: Sequence[int]) -> None:
        return None


STATIC = {"cache_implementation": "static"}
#: What each is, the module that it needs, and how it is made.
CONTESTANTS: dict[str, tuple[str, Callable[[Path], Engine]]] = {
    "transformers (sdpa, fp32)": ("transformers", Transformers),
    "transformers (eager, fp32)": ("transformers", lambda f: Transformers(f, load={"attn_implementation": "eager"})),
    "transformers (sdpa, bf16)": ("transformers", lambda f: Transformers(f, load={"dtype": torch.bfloat16})),
    # transformers compiles by itself with a static cache, though on GPUs alone unless it is told to.
    "torch.compile (fp32)": ("transformers", lambda f: Transformers(f, compiled, **STATIC)),
    "llama.cpp (Q8_0)": ("llama_cpp", LlamaCpp),
    "OpenVINO GenAI (Q8_0)": ("openvino_genai", OpenVino),
    "llmkern (fp32)": ("transformers", lambda f: Transformers(f, kernels)),
    "llmkern (int8)": ("transformers", lambda f: Transformers(f, kernels_int8)),
    "llmkern (int8, groups of 64)": (
        "transformers",
        lambda f: Transformers(f, lambda m: kernels_int8(m, inputs="row", group=64)),
    ),
    "llmkern (int8, compiled)": ("transformers", lambda f: Transformers(f, compiled_int8, **STATIC)),
}


def compiled(model: Any) -> None:
    model.forward = torch.compile(model.forward, fullgraph=True)


def compiled_int8(model: Any) -> None:
    kernels_int8(model)
    compiled(model)


def missing(name: str) -> str | None:
    needed = CONTESTANTS[name][0]
    return None if importlib.util.find_spec(needed) else f"{needed} is not installed"


def main(name: str, folder: Path, prompt: int, new: int, samples: int) -> None:
    tokens = torch.load(folder / TOKENS)
    engine = CONTESTANTS[name][1](folder)
    report: dict[str, Any] = {"prefill": [], "decode": []}
    for i in range(samples + 1):  # each with a prompt of its own, so that no cache of prompts helps; the first warms up
        ids = tokens[i * 7 : i * 7 + prompt].tolist()
        start = time.perf_counter()
        engine.continued(ids, 1)
        first = time.perf_counter()
        report["text"] = engine.continued([*ids[1:], ids[0]], 1 + new)
        both = time.perf_counter()
        if i:
            report["prefill"].append(first - start)
            report["decode"].append((both - first) - (first - start))
    windows = [w.tolist() for w in tokens.split(WINDOW) if len(w) == WINDOW]
    losses = [engine.loss(w) for w in windows]
    report["loss"] = None if None in losses else sum(losses) / (len(windows) * (WINDOW - 1))
    print(json.dumps(report))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
