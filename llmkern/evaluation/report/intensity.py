"""Where a model's phases stand under the roof of this machine: operations per byte, and operations per second.

Source: Williams, Waterman and Patterson 2009, "Roofline: an insightful visual performance model for multicore
architectures", Communications of the ACM 52(4).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmkern import extension
from llmkern.evaluation import phases, roofline, running
from llmkern.int8.module import Int8Linear


def weights_read(model: nn.Module, tokens: int) -> int:
    """The fewest bytes of parameters and buffers that a call of so many tokens reads: each once, and of a table that
    nothing but an embedding reads, the rows of its tokens alone."""
    tables: dict[int, Tensor] = {}
    others: dict[int, Tensor] = {}
    for module in model.modules():
        into = tables if isinstance(module, nn.Embedding) else others
        for t in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            into[id(t)] = t
    total = sum(t.numel() * t.element_size() for t in others.values())
    for key, t in tables.items():
        if key not in others:
            total += min(tokens, t.size(0)) * t[0].numel() * t.element_size()
    return total


def cache_bytes(model: Any, ids: Tensor, precision: str) -> int:
    """Of the keys and values that a prompt leaves. Raises AttributeError for a cache that holds none by layers."""
    with running.evaluating(model):
        cache, _ = phases.prompted(model, ids, precision)
    caches = [cache] if hasattr(cache, "layers") else [cache.self_attention_cache, cache.cross_attention_cache]
    held = [t for one in caches for layer in one.layers for t in (layer.keys, layer.values)]
    return sum(t.numel() * t.element_size() for t in held)


def least_bytes(model: Any, phase: str, ids: Tensor, precision: str) -> int:
    """What a call must move at least: its weights; in decode, the cache that the prompt left; in training, the
    gradients too. Activations do not count, which may stay in the processor's caches. ids: (B, S)."""
    if phase == "decode":
        return weights_read(model, ids.size(0)) + cache_bytes(model, ids, precision)
    read = weights_read(model, ids.numel())
    if phase == "training":
        read += sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return read


def kind_of(model: nn.Module, precision: str) -> str:
    """The rate that bounds its products: "int8", "bfloat16" or "float32" (float16 is widened)."""
    if any(isinstance(m, Int8Linear) for m in model.modules()):
        return "int8"
    parameters = next((p.dtype for p in model.parameters()), torch.float32)
    return "bfloat16" if precision == "bfloat16" or parameters is torch.bfloat16 else "float32"


def points(models: dict[str, Any], speed: dict[str, Any], ids: Tensor, precision: str) -> dict[str, Any]:
    """A point for each model and phase that was measured, under the measured peaks; or why there are none."""
    if extension._C is None:
        return {"failed": f"expected the compiled library, which measures the machine: {extension.MISSING}"}
    if any(running.device_of(m).type != "cpu" for m in models.values()):
        return {"failed": "the peaks are measured for processors alone, and the models are elsewhere"}
    peaks = roofline.peaks().to_json()
    found, failed = [], []
    for phase, by_model in speed.items():
        for name, figures in by_model.items():
            try:
                moved = least_bytes(models[name], phase, ids, precision)
            except Exception as error:  # a cache of another kind
                failed.append({"model": name, "phase": phase, "reason": f"{type(error).__name__}: {error}"})
                continue
            kind, flops = kind_of(models[name], precision), figures["flops"]
            intensity = flops / moved
            roof = min(peaks[kind], intensity * peaks["memory"])
            latency = figures["latency"]
            reached = {"median": flops / latency["median"], "low": flops / latency["high"],
                       "high": flops / latency["low"]}  # fmt: skip
            found.append({
                "model": name, "phase": phase, "kind": kind, "flops": flops, "least_bytes": moved,
                "intensity": intensity, "flops_per_second": reached, "roof": roof,
                "share_of_roof": {k: v / roof for k, v in reached.items()},
                "bound": "arithmetic" if roof == peaks[kind] else "memory",
            })  # fmt: skip
    return {"peaks": peaks, "points": found, "left_out": failed}
