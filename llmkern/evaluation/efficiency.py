"""Parameters, FLOPs, latency, throughput and peak memory of models, in prefill, decode and a training step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmkern import check, flops
from llmkern.evaluation import memory, running, scoring, timing
from llmkern.evaluation import phases as phases_of
from llmkern.models.kernelize import kernelize

PHASES = ("prefill", "decode", "training")


@dataclass(frozen=True)
class Phase:
    """One call of a phase.

    tokens: that it processes. flops: of its matrix products (a multiply-add counts 2, masks are not subtracted).
    latency_median, latency_p95: seconds, over the rounds. tokens_per_second: tokens / latency_median. peak_memory:
    bytes above what was used before the call; None where the system does not tell. speedup: of the first model's
    latency over this one's, the median of the rounds' ratios with their 20th and 80th percentile. latency: the median
    again, with these percentiles. disturbance: the share of the cores that other processes took meanwhile, the median
    of the rounds; None where the system does not tell.
    """

    tokens: int
    flops: int
    latency_median: float
    latency_p95: float
    tokens_per_second: float
    peak_memory: int | None
    speedup: timing.Spread
    latency: timing.Spread
    disturbance: float | None


@dataclass(frozen=True)
class Efficiency:
    """A model's size and phases. parameters: elements of its parameters, and of the int8 weights that stand for some.
    weight_bytes: of parameters and buffers. failed: why a phase that was asked for has no figures."""

    parameters: int
    weight_bytes: int
    phases: dict[str, Phase]
    failed: dict[str, str]


def compare_efficiency(model: nn.Module, **options: Any) -> dict[str, Efficiency]:
    """A model before and after `llmkern.kernelize`, in one run, as "before" and "after".

    model: a plain one, which stays as it is; a kernelized copy stands beside it in memory. options: those of
    `measure_efficiency`, with its errors.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    after = copy.deepcopy(model)
    kernelize(after)
    return measure_efficiency({"before": model, "after": after}, **options)


def measure_efficiency(
    models: Mapping[str, nn.Module],
    *,
    batch_size: int = 1,
    prompt_tokens: int = 128,
    phases: tuple[str, ...] = PHASES,
    rounds: int = 21,
    precision: str = "float32",
    progress: bool = True,
) -> dict[str, Efficiency]:
    """Measures models against each other: they take turns within one process, one call of each in every round.

    models: by name, the first one that which `speedup` refers to; decoders, encoders or encoder-decoders that take
    input_ids, each with the vocabulary of its configuration (`config.vocab_size`); all get the same random tokens.
    Phases:

    - prefill: a forward pass of (batch_size, prompt_tokens), in eval mode without gradients; in an encoder-decoder
      through the encoder, and of one token through the decoder.
    - decode: one more token on the cache that this leaves and that grows from call to call. Decoders and
      encoder-decoders of transformers.
    - training: forward, loss, backward; no step of an optimizer, parameters and their gradients stay as they were. The
      loss is the model's own where it takes labels, which are the tokens themselves, else the mean of its output.

    precision: as of ModelEvaluator. A model that a phase fails for has the reason in `failed`.

    Raises TypeError and ValueError for arguments of other types, for an unknown phase, for no model, one without
    config.vocab_size, and for more tokens than a model takes.
    """
    _check(models, batch_size, prompt_tokens, phases, rounds, precision)
    ids = _tokens(models, batch_size, prompt_tokens)
    found: dict[str, dict[str, Phase]] = {name: {} for name in models}
    failed: dict[str, dict[str, str]] = {name: {} for name in models}
    from tqdm import tqdm

    with tqdm(total=rounds * len(phases), desc="efficiency", disable=None if progress else True, leave=False) as bar:
        for phase in phases:
            _measure_phase(phase, models, ids, rounds, precision, bar.update, found, failed)
    return {name: Efficiency(*_size(model), phases=found[name], failed=failed[name]) for name, model in models.items()}


def count_flops(function: Callable[[], Any]) -> int:
    """The FLOPs of a call's matrix products, by torch's counter with llmkern's formulas, and one for torch's attention
    on the CPU, for which it has none."""
    from torch.utils.flop_counter import FlopCounterMode

    def forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any, out_val: Any = None, **more: Any) -> int:
        return flops._attention(query, key, value)

    def backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any) -> int:
        return flops._attention(query, key, value) * 5 // 2

    for formula in (forward, backward):
        vars(formula)["_get_raw"] = True  # it is given the tensors
    ours = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: forward,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    with FlopCounterMode(display=False, custom_mapping=ours) as counter:
        function()
    return counter.get_total_flops()


def _check(
    models: Any, batch_size: int, prompt_tokens: int, phases: tuple[str, ...], rounds: int, precision: str
) -> None:
    if not isinstance(models, Mapping) or not all(isinstance(m, nn.Module) for m in models.values()):
        came = type(models).__name__ if not isinstance(models, Mapping) else models
        raise TypeError(f"models: expected a mapping of names to nn.Modules, got {came}")
    if not models:
        raise ValueError("models: expected at least one, got none")
    for name, value in (("batch_size", batch_size), ("prompt_tokens", prompt_tokens), ("rounds", rounds)):
        check.positive(name, value)
    if isinstance(phases, str):
        raise TypeError(f"phases: expected a tuple of names, got {phases!r}")
    for phase in phases:
        check.one_of("phases", phase, PHASES)
    check.one_of("precision", precision, running.PRECISIONS)
    for name, model in models.items():
        config = getattr(model, "config", None)
        if not isinstance(getattr(config, "vocab_size", None), int):
            raise ValueError(f"models[{name!r}]: expected one with config.vocab_size, got {type(model).__name__}")
        limit = scoring.limit_of(model, None)
        most = prompt_tokens + (rounds + _EXTRA if "decode" in phases else 0)
        if limit is not None and most > limit:
            raise ValueError(
                f"prompt_tokens: expected at most {limit - most + prompt_tokens}, for which models[{name!r}] has room, "
                f"got {prompt_tokens}"
            )


#: Calls of a phase beside the rounds: the one whose FLOPs are counted, one for the memory, the warm-up's four.
_EXTRA = 6


def _tokens(models: Mapping[str, nn.Module], batch_size: int, prompt_tokens: int) -> Tensor:
    configs: list[Any] = [model.config for model in models.values()]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(min(c.vocab_size for c in configs), (batch_size, prompt_tokens), generator=generator)


def _measure_phase(
    phase: str,
    models: Mapping[str, nn.Module],
    ids: Tensor,
    rounds: int,
    precision: str,
    progress: Callable[[], Any],
    found: dict[str, dict[str, Phase]],
    failed: dict[str, dict[str, str]],
) -> None:
    """One phase of all models, into what was found and what has failed."""
    calls: dict[str, Callable[[], Any]] = {}
    flops_of: dict[str, int] = {}
    peaks: dict[str, int | None] = {}
    with ExitStack() as modes:  # outside what is timed
        for model in models.values():
            modes.enter_context(phases_of.trained(model) if phase == "training" else running.evaluating(model))
        for name, model in models.items():
            device = running.device_of(model)
            try:
                call = phases_of.CALLS[phase](model, ids.to(device), precision)
                flops_of[name] = count_flops(call)
                peaks[name] = memory.peak(call, device)
            except Exception as error:  # whatever a model cannot do is its result
                failed[name][phase] = f"{type(error).__name__}: {error}".split("\n", 1)[0]
                continue
            calls[name] = call
        if not calls:
            return
        # Calls one by one, so that the 95th percentile is one of calls.
        result = timing.measure(calls, rounds=rounds, sample_seconds=0.0, progress=progress)
    tokens = ids.size(0) if phase == "decode" else ids.numel()
    disturbance = timing.Spread.of(result.disturbance).median if result.disturbance else None
    for name, reason in result.failed.items():
        failed[name][phase] = reason
    for name in result.names:
        latency, p95 = result.time(name), timing.percentile(result.samples[name], 0.95)
        speedup = result.ratio(name, result.baseline if result.baseline in result.samples else name)
        found[name][phase] = Phase(
            tokens,
            flops_of[name],
            latency.median,
            p95,
            tokens / latency.median,
            peaks[name],
            speedup,
            latency,
            disturbance,
        )


def _size(model: nn.Module) -> tuple[int, int]:
    held = [*model.parameters(), *model.buffers()]
    # An int8 weight is a buffer.
    elements = sum(t.numel() for t in held if isinstance(t, nn.Parameter) or t.dtype == torch.int8)
    return elements, sum(t.numel() * t.element_size() for t in held)
