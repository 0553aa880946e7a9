"""The head of a report: what changed, in a sentence and a few figures for each model."""

from __future__ import annotations

from typing import Any

from llmkern.evaluation.report.figures import Figure, figure
from llmkern.evaluation.report.variants import KERNELIZED
from llmkern.evaluation.report.view import Block, Cards, Content, Paragraph, Piece, Section

WORDS = {"prefill": "reads a prompt", "decode": "generates", "training": "trains"}
TITLES = {"prefill": "prefill", "decode": "decode", "training": "training step"}


def section(report: dict[str, Any]) -> Section:
    first, *others = report["models"]
    blocks: list[Block] = [Paragraph(sentence(report, name, first)) for name in others]
    blocks.append(Cards("The figures that count", [(name, card(report, name)) for name in others]))
    if report["model"]["note"]:
        blocks.append(Paragraph(report["model"]["note"], note=True))
    return Section("summary", "Summary", blocks)


def sentence(report: dict[str, Any], name: str, first: str) -> list[Piece]:
    """What one model is beside the published one."""
    found: list[Piece] = [f"The {name} model "]
    phases = phases_of(report, name)
    for number, phase in enumerate(phases):
        ratio = figure(report, "speed", "phases", phase, name, "speedup", unit="times")
        joint = "" if number == 0 else " and " if number == len(phases) - 1 else ", "
        found += [joint, WORDS[phase], " ", ratio]
    found.append(" times as fast as the published one" if phases else "was not timed")
    size = report["size"]
    if size[name]["weight_bytes"] < 0.99 * size[first]["weight_bytes"]:
        found += [", its weights take ", figure(report, "size", name, "weight_bytes", unit="bytes"), " instead of ",
                  figure(report, "size", first, "weight_bytes", unit="bytes")]  # fmt: skip
        if name in report["replaced"]["int8"]:
            found.append(" (beside copies that kernels pack of int8 weights, which are not counted)")
    found += _quality(report, name, first)
    if name == KERNELIZED:
        found.append(f"; {_contract(report['equivalence'])}")
    found.append(".")
    int8 = report["replaced"]["int8"].get(name)
    if int8 is not None and not int8["replaced"]:
        path = ("replaced", "int8", name)
        found += [" It is NOT in int8: ", figure(report, *path, "replaced", unit="count"), " of ",
                  figure(report, *path, "count", unit="count"), " linear layers were replaced."]  # fmt: skip
    return found


def _contract(told: dict[str, Any]) -> str:
    if not told.get("finite", True):
        return "outputs of the published model are not finite, so that the numerical contract says nothing"
    if "failed" in told:
        return "whether it keeps the numerical contract could not be measured"
    if told["passed"]:
        return "it is the published model by the numerical contract"
    return "it does NOT keep the numerical contract"


def phases_of(report: dict[str, Any], name: str) -> list[str]:
    """Those that were measured and mean the same as in the published model: int8 weights are not trained."""
    frozen = name in report["replaced"]["int8"]
    phases = report["speed"].get("phases", {})
    return [p for p, models in phases.items() if name in models and not (frozen and p == "training")]


def _quality(report: dict[str, Any], name: str, first: str) -> list[Piece]:
    quality = report["quality"]
    told = quality["figures"][0]
    lost = [one for one in (name, first) if one not in quality["models"]]
    if lost:
        return [f"; the {told['title']} of the {lost[0]} model could not be measured"]
    if quality["models"][name][told["field"]] is None:
        return [f"; its {told['title']} is not a number: its outputs are not finite"]
    own = figure(report, "quality", "models", name, told["field"], unit=told["unit"])
    if told["change"] is None:
        return ["; ", told["title"], " ", own]
    before = figure(report, "quality", "models", first, told["field"], unit=told["unit"])
    return ["; ", told["title"], " ", own, " after ", before, " (", change(report, name, told), ")"]


def change(report: dict[str, Any], name: str, told: dict[str, Any]) -> Figure:
    """How a figure of the quality differs from the published model's."""
    unit = "change" if told["change"] == "relative" else "points"
    return figure(report, "quality", "models", name, f"{told['field']}_change", unit=unit)


def card(report: dict[str, Any], name: str) -> list[tuple[str, Content]]:
    rows: list[tuple[str, Content]] = []
    for phase in phases_of(report, name):
        ratio = figure(report, "speed", "phases", phase, name, "speedup", unit="times")
        rows.append((f"{TITLES[phase]}, times as fast", ratio))
    rows.append(("weights, of the published", figure(report, "size", name, "share", unit="share")))
    quality = report["quality"]
    if name in quality["models"]:
        told = quality["figures"][0]
        own = figure(report, "quality", "models", name, told["field"], unit=told["unit"])
        changed = f"{told['field']}_change" in quality["models"][name]  # it is not where the published model failed
        rows.append((f"{told['title']}, change", change(report, name, told)) if changed else (told["title"], own))
    cost = report["cost"]["phases"]
    served = next((p for p in ("decode", "prefill", "training") if name in cost.get(p, {})), None)
    if served is not None:
        title = f"cost of {'generated ' if served == 'decode' else ''}tokens"
        if report["cost"]["machine"]:
            unit = f"money {report['cost']['currency']}".strip()
            own = figure(report, "cost", "phases", served, name, "per_million_tokens", unit=unit)
            rows.append((f"{title}, a million", own))
        else:
            rows.append(
                (f"{title}, before: 1.00", figure(report, "cost", "phases", served, name, "relative", unit="times"))
            )
    return rows
