"""The sections of what was replaced, whether the model is still the same, and what it is worth."""

from __future__ import annotations

from typing import Any

from llmkern.evaluation.report.figures import figure
from llmkern.evaluation.report.summary import change
from llmkern.evaluation.report.view import Block, Content, Paragraph, Piece, Section, Table, again, counted

#: Rows of the contract's table that are shown at once; the rest are in the JSON.
SHOWN = 6


def replaced(report: dict[str, Any]) -> Section:
    told = report["replaced"]
    kernels = told["kernelized"]
    blocks: list[Block] = [
        Paragraph([
            "kernelize replaced ", figure(report, "replaced", "kernelized", "replaced", unit="count"), " of ",
            figure(report, "replaced", "kernelized", "count", unit="count"), " modules that kernels might serve.",
        ])
    ]  # fmt: skip
    rows: list[list[Content]] = []
    for i, group in enumerate(kernels["groups"]):
        many = figure(report, "replaced", "kernelized", "groups", i, "count", unit="count")
        rows.append([group["class"], many, group["by"] or f"left: {group['left']}", group["first"] or "(the model)"])
    if rows:
        blocks.append(Table("Modules on llmkern's kernels", ("class", "modules", "served by", "the first"), rows))
    for name, int8 in told["int8"].items():
        path = ("replaced", "int8", name)
        blocks.append(Paragraph([
            f"The {name} model has ", figure(report, *path, "replaced", unit="count"), " of ",
            figure(report, *path, "count", unit="count"), f" linear layers in int8 (scheme {int8['scheme']}): ",
            figure(report, *path, "bytes_before", unit="bytes"), " of weights before, ",
            figure(report, *path, "bytes_after", unit="bytes"), " after; the largest error of a layer's weights is ",
            figure(report, *path, "weight_error_largest", unit="share"), " of them.",
        ]))  # fmt: skip
        left = [
            [group["left"], figure(report, *path, "groups", i, "count", unit="count"), group["first"] or "(the model)"]
            for i, group in enumerate(int8["groups"])
            if group["left"]
        ]
        if left:
            blocks.append(Table(f"Linear layers that {name} leaves", ("why", "layers", "the first"), left))
    return Section("replaced", "What was replaced", [*blocks, again(report, "replaced")])


def equivalence(report: dict[str, Any]) -> Section:
    told = report["equivalence"]
    shape = " x ".join(map(str, told["inputs"]["shape"]))
    what = "outputs and gradients" if told["gradients"] else "outputs"
    blocks: list[Block] = []
    if "failed" in told:
        blocks.append(Paragraph(f"Not measured: {told['failed']}"))
    else:
        verdict = "The kernelized model keeps the contract" if told["passed"] else "The contract is NOT kept"
        if not told.get("finite", True):
            blocks.append(Paragraph("The published model's outputs are not finite: errors count where they are alone."))
            verdict = "Of what is finite"
        blocks.append(Paragraph([
            f"{verdict}: ", figure(report, "equivalence", "kept", unit="count"), " of ",
            figure(report, "equivalence", "count", unit="count"), f" {what} are as near to the truth as they must be.",
        ]))  # fmt: skip
        order = sorted(range(len(told["rows"])), key=lambda i: -_nearness(told["rows"][i]))
        rows: list[list[Content]] = []
        for i in order[:SHOWN]:
            row, path = told["rows"][i], ("equivalence", "rows", i)
            numbers: list[Content] = [
                figure(report, *path, f"{kind}_{field}", unit="error")
                for kind in ("max", "rms")
                for field in ("error", "reference", "allowed")
            ]
            rows.append([row["name"], row["kind"], *numbers, "kept" if row["passed"] else f"not kept: {row['reason']}"])
        head = (
            "tensor",
            "kind",
            "largest error",
            "published",
            "allowed",
            "rms error",
            "published",
            "allowed",
            "contract",
        )
        more = f", the {SHOWN} nearest to what is allowed" if len(order) > SHOWN else ""
        blocks.append(Table(f"Errors against the same model in float64{more}", head, rows))
        blocks += [Paragraph(note, note=True) for note in told["notes"]]
    blocks.append(Paragraph(
        f"Both models run on the beginnings of texts of the data ({shape} tokens, of which {told['inputs']['tokens']} "
        "are no padding). The truth is the published model in float64; the error of the kernelized one may be at most "
        "twice the published one's own in its precision, plus one unit in the last place of the output's scale. Int8 "
        "is another model by design: what it changes is below, under quality.", note=True,
    ))  # fmt: skip
    return Section("equivalence", "Equivalence", [*blocks, again(report, "equivalence")])


def _nearness(row: dict[str, Any]) -> float:
    """How much of the allowed error a row uses; those that fail first."""
    if not row["passed"]:
        return float("inf")
    pairs = [(row[f"{kind}_error"], row[f"{kind}_allowed"]) for kind in ("max", "rms")]
    return max((e / a for e, a in pairs if isinstance(e, float) and isinstance(a, float) and a), default=0.0)


EXPLAINED = {
    "perplexity": "Perplexity is exp of the mean negative log-likelihood of each token given those before it, in "
    "windows of {window} tokens that begin {stride} apart. Lower is better.",
    "pseudo-perplexity": "Pseudo-perplexity is exp of the mean negative log-likelihood of each token, hidden alone "
    "while all others are seen (Salazar et al. 2020). Lower is better.",
    "generation": "Texts continued by at most {max_new_tokens} tokens, without sampling and beams; penalties of the "
    "model's generation_config stay. BLEU is sacrebleu's, 0 to 100; ROUGE "
    "is rouge-score's F-measure, 0 to 1.",
    "classification": "The class of the highest logit; accuracy and F1 are scikit-learn's, 0 to 1.",
    "embeddings": "The cosine of each text's embedding, the mean of its last hidden states, with that of the published "
    "model: 1 is the same direction. Kept are the published model's nearest texts that are this one's as well.",
}


def quality(report: dict[str, Any]) -> Section:
    told, data = report["quality"], report["data"]
    rows: list[list[Content]] = []
    for name in report["models"]:
        if name in told["failed"]:
            rows.append([name, f"not measured: {told['failed'][name]}", *[""] * (_width(told) - 2)])
            continue
        row: list[Content] = [name]
        for one in told["figures"]:
            row.append(figure(report, "quality", "models", name, one["field"], unit=one["unit"]))
            if one["change"]:
                measured = f"{one['field']}_change" in told["models"][name]
                row.append(change(report, name, one) if measured else "not told")
        rows.append(row)
    head = ["model"]
    for one in told["figures"]:
        head += [one["title"], "change"] if one["change"] else [one["title"]]
    used: list[Piece] = [
        "On ", figure(report, "data", "records_used", unit="count"), " of ",
        figure(report, "data", "records", unit="count"), f" {_record(data)} of the data, ",
        figure(report, "data", "tokens_used", unit="count"), " tokens.",
    ]  # fmt: skip
    cut = counted(data["cut"], "text was", "texts were") + " shortened to what the model takes. " if data["cut"] else ""
    explained = cut + EXPLAINED[told["measure"]].format(**told["options"])
    signatures = {one["signature"] for one in told["models"].values() if "signature" in one}
    if signatures:
        explained += f" Signature: {', '.join(sorted(signatures))}."
    blocks: list[Block] = [
        Paragraph(used),
        Table("Quality before and after", head, rows),
        Paragraph(explained, note=True),
    ]
    return Section("quality", "Quality", [*blocks, again(report, "quality")])


def _width(told: dict[str, Any]) -> int:
    return 1 + sum(2 if one["change"] else 1 for one in told["figures"])


def _record(data: dict[str, Any]) -> str:
    named = {"text": "text", "texts": "text", "pairs": "prompt", "labels": "text"}[data["format"]]
    return named if data["records"] == 1 else f"{named}s"
