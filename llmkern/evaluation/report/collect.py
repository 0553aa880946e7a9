"""Gathers everything that a report says into one dict of plain values, from which alone the report is written."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import shlex
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmkern.evaluation import efficiency, machine, running, scoring
from llmkern.evaluation.report import equivalence, intensity, money, quality, variants
from llmkern.evaluation.report.data import Data, read_data
from llmkern.evaluation.report.loading import kind_of
from llmkern.evaluation.report.settings import TOKENS, ReportSettings
from llmkern.int8.module import Int8Linear
from llmkern.models.swap import exchanged

FORMAT = 1
#: What the lines of every section stand on.
IMPORTS = """\
import copy
import torch
import transformers
import llmkern
from llmkern.evaluation import ModelEvaluator, measure_efficiency
from llmkern.evaluation.report import read_data
"""
PACKAGES = ("transformers", "tokenizers", "numpy", "sacrebleu", "rouge-score", "scikit-learn", "matplotlib")


def collect(
    model: Any, tokenizer: Any, data: Data, settings: ReportSettings, *, name: str, loading: str, note: str,
    command: list[str] | None, stage: Callable[[str], Any], progress: bool,
) -> dict[str, Any]:  # fmt: skip
    """loading: the lines of Python that load the model and its tokenizer. command: that which asked for the report.
    stage: told what is done next."""
    kind = kind_of(model)
    measure = quality.measure_of(kind, data.format)
    phases = settings.phases or (("prefill", "decode") if "decoder" in kind else ("prefill",))
    prompt = _prompt_tokens(model, tokenizer, phases, settings)
    if any(exchanged(m) is not None or isinstance(m, Int8Linear) for m in model.modules()):
        raise ValueError("model: expected it as published, got one that is kernelized or quantised already")
    limit = None if kind == "decoder" else scoring.limit_of(model, tokenizer)
    if kind not in ("decoder", "encoder_decoder"):
        data = data.lines()
    wanted = settings.tokens or TOKENS[kind]
    used = data.used(tokenizer, wanted, limit)
    options = quality.options_of(measure, model, tokenizer, settings.window, settings.stride, settings.max_new_tokens)
    if measure == "classification":
        quality.labels_of(model, used)  # before anything is measured

    stage("kernels")
    models, replaced = variants.make(model, settings.schemes)
    ids = tokens_of(model, settings.batch_size, prompt)
    result: dict[str, Any] = {
        "format": FORMAT,
        "model": {"name": name, "class": type(model).__name__, "kind": kind, "dtype": _dtype(model), "note": note},
        "data": _described(data, used, tokenizer),
        "settings": {**dataclasses.asdict(settings), "phases": list(phases), "prompt_tokens": prompt, "seed": 0},
        "machine": {**machine.describe(), "packages": _versions()},
        "command": None if command is None else shlex.join(["python", "-m", "llmkern", "report", *command]),
        "models": list(models),
        "replaced": replaced,
    }
    column = "prompt" if data.format == "pairs" else "text"
    stage("equivalence")
    batch = equivalence.batch_of(tokenizer, used.column(column), pairs=kind == "encoder_decoder")
    result["equivalence"] = equivalence.measure(model, models[variants.KERNELIZED], batch, settings.gradients)
    stage("quality")
    result["quality"] = quality.measure(
        models, tokenizer, used, measure, options, settings.precision, lambda one: stage(f"quality, {one}")
    )
    stage("speed")
    result["size"], result["speed"] = _speed(models, kind, phases, prompt, settings, progress)
    stage("cost and roofline")
    by_phase = result["speed"].get("phases", {})
    result["cost"] = money.costs(by_phase, settings, list(replaced["int8"]))
    result["roofline"] = (
        intensity.points(models, by_phase, ids, settings.precision) if by_phase else {"failed": "no speed was measured"}
    )
    result["code"] = _code(result, model, loading, data, wanted, limit, column, settings)
    return _plain(result)


def tokens_of(model: Any, batch_size: int, prompt_tokens: int) -> Tensor:
    """What measure_efficiency gives the model, (B, S) int64."""
    return efficiency._tokens({"": model}, batch_size, prompt_tokens).to(running.device_of(model))


def _prompt_tokens(model: Any, tokenizer: Any, phases: tuple[str, ...], settings: ReportSettings) -> int:
    """Those asked for, or as many as there is room for. Raises ValueError where there is none for those asked for."""
    limit = scoring.limit_of(model, None)
    room = None if limit is None else limit - (settings.rounds + efficiency._EXTRA if "decode" in phases else 0)
    if settings.prompt_tokens is not None:
        if room is not None and settings.prompt_tokens > room:
            raise ValueError(
                f"prompt_tokens: expected at most {room}, for which the model has room, got {settings.prompt_tokens}"
            )
        return settings.prompt_tokens
    if limit is not None and room is not None and room < 1:
        raise ValueError(f"rounds: expected at most {limit - efficiency._EXTRA - 1}, for which the model has room, "
                         f"got {settings.rounds}")  # fmt: skip
    return min(128, room or 128)


def _speed(
    models: dict[str, Any], kind: str, phases: tuple[str, ...], prompt: int, settings: ReportSettings, progress: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sizes and phases by model; or why there are none."""
    size: dict[str, dict[str, Any]] = {
        name: dict(zip(("parameters", "weight_bytes"), efficiency._size(model), strict=True))
        for name, model in models.items()
    }
    first = next(iter(size.values()))["weight_bytes"]
    for one in size.values():
        one["share"] = one["weight_bytes"] / first
    asked: dict[str, Any] = {"batch_size": settings.batch_size, "prompt_tokens": prompt, "rounds": settings.rounds,
             "precision": settings.precision}  # fmt: skip
    try:
        found = efficiency.measure_efficiency(models, phases=phases, progress=progress, **asked)
    except ValueError as error:  # a kind of model that is not served
        return size, {**asked, "failed": str(error)}
    failed: dict[str, dict[str, str]] = {}
    for phase in phases:
        reasons = {name: one.failed[phase] for name, one in found.items() if phase in one.failed}
        if reasons:
            failed[phase] = reasons
    by_phase = figures_by_phase(found, phases)
    return size, {**asked, "phases": by_phase, "not_measured": failed}


def figures_by_phase(found: dict[str, Any], phases: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Of each phase that was measured, each model's figures. found: what measure_efficiency gave."""
    by_phase = {p: {n: _figures(one.phases[p]) for n, one in found.items() if p in one.phases} for p in phases}
    return {phase: models for phase, models in by_phase.items() if models}


def _figures(phase: efficiency.Phase) -> dict[str, Any]:
    latency, tokens = phase.latency._asdict(), phase.tokens
    rate = {into: tokens / latency[of] for into, of in (("median", "median"), ("low", "high"), ("high", "low"))}
    return {
        "tokens": tokens, "flops": phase.flops, "latency": latency, "latency_p95": phase.latency_p95,
        "tokens_per_second": rate, "speedup": phase.speedup._asdict(), "peak_memory": phase.peak_memory,
        "disturbance": phase.disturbance,
    }  # fmt: skip


def _described(data: Data, used: Data, tokenizer: Any) -> dict[str, Any]:
    from llmkern.evaluation.report.data import count

    field = "prompt" if used.format == "pairs" else "text"
    return {
        "file": data.file, "sha256": data.sha256, "format": data.format, "records": len(data.records),
        "records_used": len(used.records), "tokens_used": sum(count(tokenizer, t) for t in used.column(field)),
        "characters_used": sum(map(len, used.column(field))), "cut": used.cut,
    }  # fmt: skip


def _code(
    result: dict[str, Any], model: Any, loading: str, data: Data, wanted: int, limit: int | None, column: str,
    settings: ReportSettings,
) -> dict[str, str]:  # fmt: skip
    """Of each section the lines of Python that make its figures again, behind those of "first"."""
    speed, found = result["speed"], result["quality"]
    phases = tuple(result["settings"]["phases"])
    read = f"data = read_data({data.file!r})"
    lines = (
        ".lines()" if data.format == "texts" and result["model"]["kind"] not in ("decoder", "encoder_decoder") else ""
    )
    first = [IMPORTS.rstrip(), loading, variants.code(model, settings.schemes),
             f"{read}{lines}.used(tokenizer, tokens={wanted}, limit={limit})"]  # fmt: skip
    asked = ", ".join(f"{k}={speed[k]!r}" for k in ("batch_size", "prompt_tokens", "rounds", "precision"))
    names = [n for n in result["models"] if n not in (variants.PUBLISHED, variants.KERNELIZED)]
    reports = "".join(f"\nprint(models[{name!r}].quantization_report)" for name in names)
    measured = f"phases = {phases!r}\nfound = measure_efficiency(models, phases=phases, {asked})"
    by_phase = (
        f"from llmkern.evaluation.report.collect import figures_by_phase\n{measured}\n"
        "speed = figures_by_phase(found, phases)"
    )
    return {
        "first": "\n".join(first),
        "replaced": f"print(llmkern.report(kernelized)){reports}",
        "equivalence": equivalence.code(
            f"data.column({column!r})", result["model"]["kind"] == "encoder_decoder", settings.gradients
        ),
        "quality": quality.code(found["measure"], found["options"], settings.precision),
        "speed": (
            f"{measured}\nprint(found)\n"
            "share = {name: one.weight_bytes / found['published'].weight_bytes for name, one in found.items()}\n"
            "print(share)"
        ),
        "cost": f"{by_phase}\n{money.code(settings, list(result['replaced']['int8']))}",
        "roofline": (
            f"{by_phase}\n"
            "from llmkern.evaluation.report.collect import tokens_of\n"
            "from llmkern.evaluation.report.intensity import points\n"
            f"ids = tokens_of(published, {speed['batch_size']}, {speed['prompt_tokens']})\n"
            f"told = points(models, speed, ids, {settings.precision!r})\n"
            "print(told)"
        ),
    }  # fmt: skip


def _dtype(model: Any) -> str:
    return str(next((p.dtype for p in model.parameters()), torch.float32)).removeprefix("torch.")


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _plain(value: Any) -> Any:
    """For JSON, which has no number for what is not finite: NaN as null, infinity by its name."""
    if isinstance(value, dict):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "infinite" if value > 0 else "-infinite"
    return value


__all__ = ["FORMAT", "collect", "read_data", "tokens_of"]
