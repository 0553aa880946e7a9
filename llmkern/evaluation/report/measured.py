"""The sections of speed, memory, cost, and the roofline."""

from __future__ import annotations

from typing import Any

from llmkern.evaluation.report.figures import figure
from llmkern.evaluation.report.summary import TITLES
from llmkern.evaluation.report.view import Block, Content, Paragraph, Plot, Section, Table, again


def speed(report: dict[str, Any]) -> Section:
    told = report["speed"]
    if "failed" in told:
        return Section("speed", "Speed", [Paragraph(f"Not measured: {told['failed']}"), again(report, "speed")])
    blocks: list[Block] = []
    for phase, models in told["phases"].items():
        rows: list[list[Content]] = []
        for name in report["models"]:
            if name not in models:
                rows.append([name, f"not measured: {told['not_measured'][phase][name]}", "", "", "", ""])
                continue
            path = ("speed", "phases", phase, name)
            rows.append([
                name,
                figure(report, *path, "tokens_per_second", unit="ratio"),
                figure(report, *path, "latency", unit="time"),
                figure(report, *path, "latency_p95", unit="time"),
                figure(report, *path, "speedup", unit="times"),
                figure(report, *path, "flops", unit="flop"),
            ])  # fmt: skip
        head = ("model", "tokens per second", "latency", "95th percentile", "times as fast", "work of a call")
        blocks.append(Table(_call(told, phase), head, rows))
    for phase, reasons in told["not_measured"].items():
        if phase not in told["phases"]:
            blocks.append(Paragraph(f"{_call(told, phase)}: not measured: {next(iter(reasons.values()))}"))
    if "training" in told["phases"] and report["replaced"]["int8"]:
        blocks.append(Paragraph("Int8 weights are frozen: a training step makes no gradients of theirs.", note=True))
    busy = {phase: next(iter(models)) for phase, models in told["phases"].items()}
    for phase, name in busy.items():
        if told["phases"][phase][name]["disturbance"] is not None:
            taken = figure(report, "speed", "phases", phase, name, "disturbance", unit="share")
            blocks.append(Paragraph([f"During {phase}, other processes took ", taken, " of the cores."], note=True))
    blocks.append(Paragraph(
        f"Median of {told['rounds']} rounds, in brackets the 20th and 80th percentile. The models take turns within "
        "one process, one call of each in every round, in random order; times as fast is the median of the rounds' "
        "ratios. Work is that of matrix products, a multiply-add counted as 2, masks not subtracted.", note=True,
    ))  # fmt: skip
    return Section("speed", "Speed", [*blocks, again(report, "speed")])


def _call(told: dict[str, Any], phase: str) -> str:
    rows, tokens = told["batch_size"], told["prompt_tokens"]
    of = {
        "prefill": f"one pass over {rows} x {tokens} tokens",
        "decode": f"one more token for each of {rows} behind {tokens}",
        "training": f"forward, loss and backward of {rows} x {tokens} tokens",
    }[phase]
    precision = "" if told["precision"] == "float32" else f", under autocast to {told['precision']}"
    return f"{TITLES[phase].capitalize()}: {of}{precision}"


def memory(report: dict[str, Any]) -> Section:
    phases = report["speed"].get("phases", {})
    head = ["model", "parameters", "weights", "of the published", *(f"{TITLES[p]}, peak" for p in phases)]
    rows: list[list[Content]] = []
    for name in report["models"]:
        row: list[Content] = [
            name,
            figure(report, "size", name, "parameters", unit="count"),
            figure(report, "size", name, "weight_bytes", unit="bytes"),
            figure(report, "size", name, "share", unit="share"),
        ]
        for phase, models in phases.items():
            measured = name in models
            row.append(
                figure(report, "speed", "phases", phase, name, "peak_memory", unit="bytes")
                if measured
                else "not measured"
            )
        rows.append(row)
    note = (
        "Weights are all parameters and buffers. A peak is what a call takes above what was used before it: on a "
        "processor, of the process's resident pages, roughly for small models. "
        "Prepared copies that kernels keep of int8 weights are not counted."
    )
    return Section("memory", "Memory", [Table("Size and peak", head, rows), Paragraph(note, note=True),
                                        again(report, "speed")])  # fmt: skip


def cost(report: dict[str, Any]) -> Section:
    told = report["cost"]
    blocks: list[Block] = [Paragraph(told["note"])] if told["note"] else []
    unit = f"money {told['currency']}".strip()
    priced = told["machine"] is not None
    if priced:
        blocks.append(Paragraph([
            "An hour of the machine costs ", figure(report, "cost", "machine", "cost_per_hour", unit=unit),
            "; it is at work for ", figure(report, "cost", "utilisation", unit="share"), " of the time.",
        ]))  # fmt: skip
    for phase, models in told["phases"].items():
        rows: list[list[Content]] = []
        for name in models:
            path = ("cost", "phases", phase, name)
            row: list[Content] = [name]
            if priced:
                row.append(figure(report, *path, "per_million_tokens", unit=unit))
            rows.append([*row, figure(report, *path, "relative", unit="times")])
        head = ["model", *(["a million tokens"] if priced else []), "beside the published model"]
        blocks.append(Table(f"Cost of tokens, {TITLES[phase]}", head, rows))
    if not told["phases"]:
        blocks.append(Paragraph("Not computed: no speed was measured."))
    if "service" in told:
        blocks += _service(report, unit)
    return Section("cost", "Cost", [*blocks, again(report, "cost")])


def _service(report: dict[str, Any], unit: str) -> list[Block]:
    told = report["cost"]["service"]
    back = told.get("return")
    rows: list[list[Content]] = []
    for name in told["models"]:
        path = ("cost", "service", "models", name)
        row: list[Content] = [
            name,
            figure(report, *path, "machines", unit="count"),
            figure(report, *path, "cost_per_year", unit=unit),
        ]
        if back is not None:
            way = ("cost", "service", "return", name)
            fields = (("saved_per_year", unit), ("return_on_investment", "times"), ("payback_years", "ratio"))
            row += [figure(report, *way, f, unit=u) if name in back else "" for f, u in fields]
        rows.append(row)
    more = ["saved a year", "return on investment", "years to pay back"] if back is not None else []
    text: list[Any] = ["A service of ", figure(report, "cost", "service", "tokens_per_day", unit="count"),
                       f" tokens a day, at the rate of {TITLES[told['phase']]}, on whole machines"]  # fmt: skip
    if back is not None:
        text += [", for an investment of ", figure(report, "cost", "service", "investment", unit=unit), " over ",
                 figure(report, "cost", "service", "years", unit="ratio"), " years"]  # fmt: skip
    return [Paragraph([*text, "."]), Table("A year of service", ["model", "machines", "a year", *more], rows)]


def roofline(report: dict[str, Any]) -> Section:
    told = report["roofline"]
    if "failed" in told:
        return Section("roofline", "Roofline", [Paragraph(f"Not drawn: {told['failed']}"), again(report, "roofline")])
    peak: list[Any] = ["Measured peaks of this machine: "]
    kinds = ("float32", "bfloat16", "int8")
    for kind in kinds:
        peak += [f"{kind} ", figure(report, "roofline", "peaks", kind, unit="flop/s"), ", "]
    peak += ["reading memory ", figure(report, "roofline", "peaks", "memory", unit="bytes/s"), ", cache ",
             figure(report, "roofline", "peaks", "cache", unit="bytes/s"), "."]  # fmt: skip
    rows: list[list[Content]] = []
    for i, point in enumerate(told["points"]):
        path = ("roofline", "points", i)
        rows.append([
            f"{point['model']}, {TITLES[point['phase']]}",
            figure(report, *path, "least_bytes", unit="bytes"),
            figure(report, *path, "intensity", unit="ratio"),
            figure(report, *path, "flops_per_second", unit="flop/s"),
            figure(report, *path, "roof", unit="flop/s"),
            figure(report, *path, "share_of_roof", unit="share"),
            "memory" if point["bound"] == "memory" else f"{point['kind']} arithmetic",
        ])  # fmt: skip
    head = ("model, phase", "least bytes", "FLOP per byte", "reached", "roof there", "of the roof", "bound by")
    blocks: list[Block] = [Plot("Work per byte, and work per second, under this machine's roof", alt(report))]
    blocks.append(Table("Points of the plot", head, rows))
    blocks += [Paragraph(f"{one['model']}, {one['phase']}: not drawn: {one['reason']}") for one in told["left_out"]]
    blocks += [
        Paragraph(peak),
        Paragraph(
            "Least bytes: each weight once as it is stored (of an embedding's table the rows of the tokens), the cache "
            "in decode, the gradients in training. What a processor's caches keep from call to call does not come from "
            "memory, so that a small model can stand above the roof of memory. Int8 models also do work in floating "
            "point, which has a lower peak.", note=True,
        ),
    ]  # fmt: skip
    return Section("roofline", "Roofline", [*blocks, again(report, "roofline")])


def alt(report: dict[str, Any]) -> str:
    """The plot in words."""
    said = []
    for i, point in enumerate(report["roofline"]["points"]):
        path = ("roofline", "points", i)
        reached = figure(report, *path, "flops_per_second", unit="flop/s").text
        at = figure(report, *path, "intensity", unit="ratio").text
        share = figure(report, *path, "share_of_roof", unit="share").text
        said.append(f"{point['model']} {point['phase']}: {reached} at {at} FLOP per byte, {share} of the roof")
    return "A roofline plot with logarithmic axes. " + "; ".join(said) + "."
