"""The models that a report compares: as published, kernelized, and in int8."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llmkern.evaluation.report.loading import twin
from llmkern.models.huggingface import head
from llmkern.models.kernelize import kernelize
from llmkern.models.quantize import quantize_model

PUBLISHED, KERNELIZED = "published", "kernelized"


def int8_name(scheme: str, schemes: Iterable[str]) -> str:
    """How a model of that scheme is called: int8, and by its scheme where there are several."""
    return "int8" if len(list(schemes)) == 1 else f"int8 {scheme}"


def make(published: Any, schemes: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The models by name, the first as it is given, and what became of their parts."""
    kernelized = twin(published)
    done = kernelize(kernelized)
    models = {PUBLISHED: published, KERNELIZED: kernelized}
    replaced: dict[str, Any] = {
        "kernelized": {
            "modules": [{"name": m.name, "class": m.kind, "by": m.by, "left": m.left} for m in done.modules],
            "replaced": len(done.replaced),
            "count": len(done.modules),
        },
        "int8": {},
    }
    replaced["kernelized"]["groups"] = _groups(replaced["kernelized"]["modules"], ("class", "by", "left"))
    for scheme in schemes:
        name = int8_name(scheme, schemes)
        model = quantize_model(twin(kernelized), scheme=scheme, skip=_skipped(published), measure=False, progress=False)
        models[name] = model
        report: Any = model.quantization_report
        layers = [
            {"name": e.name, "shape": list(e.shape), "left": e.left, "bytes_before": e.bytes_before,
             "bytes_after": e.bytes_after, "weight_error": e.error}
            for e in report.layers
        ]  # fmt: skip
        kept = [e for e in layers if not e["left"]]
        replaced["int8"][name] = {
            "scheme": scheme,
            "layers": layers,
            "replaced": len(kept),
            "count": len(layers),
            "bytes_before": sum(e["bytes_before"] for e in layers),
            "bytes_after": sum(e["bytes_after"] for e in layers),
            "weight_error_largest": max((e["weight_error"] for e in kept), default=None),
            "groups": _groups(layers, ("left",)),
        }
    return models, replaced


def _skipped(model: Any) -> list[str]:
    return head(model) if callable(getattr(model, "get_output_embeddings", None)) else []


def _groups(entries: list[dict[str, Any]], by: tuple[str, ...]) -> list[dict[str, Any]]:
    """Entries that are alike in these fields, with their number and the first one's name."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for entry in entries:
        key = tuple(entry[field] for field in by)
        group = found.setdefault(key, {**dict(zip(by, key, strict=True)), "count": 0, "first": entry["name"]})
        group["count"] += 1
    return list(found.values())


def code(published: Any, schemes: tuple[str, ...]) -> str:
    """The lines of Python that make them of `published`."""
    lines = [
        "kernelized = copy.deepcopy(published)",
        "llmkern.kernelize(kernelized)",
        "models = {'published': published, 'kernelized': kernelized}",
    ]
    for scheme in schemes:
        name = int8_name(scheme, schemes)
        options = f"scheme={scheme!r}, skip={_skipped(published)!r}, measure=False"
        lines.append(f"models[{name!r}] = llmkern.quantize_model(copy.deepcopy(kernelized), {options})")
    return "\n".join(lines)
