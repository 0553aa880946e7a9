"""Reports of small models on small data, each made once."""

from __future__ import annotations

import contextlib
import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from llmkern.evaluation import MachineCost, roofline
from llmkern.evaluation.report import EvaluationReport, ReportSettings, load, make_report
from tests.evaluation import tiny

PAIRS = [
    {"prompt": t, "reference": r} for t, r in zip(tiny.TEXTS, [["a dog", "the cat"], *tiny.TEXTS[1:]], strict=True)
]
LABELS = [{"text": t, "label": i % 3} for i, t in enumerate(tiny.TEXTS)]
QUICK = {"rounds": 2, "prompt_tokens": 16, "batch_size": 2}
NAME = "a <script>alert(1)</script> | `model` & *more*"


class Made(NamedTuple):
    report: EvaluationReport
    model: Any
    folder: Path
    data: Path
    settings: ReportSettings


KINDS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "decoder": (
        tiny.llama, "text",
        {"schemes": ("outliers", "row"), "gradients": True, "phases": ("prefill", "decode", "training"), "tokens": 90,
         "window": 16, "stride": 8, "machine": MachineCost(0.5), "currency": "EUR", "utilisation": 0.4,
         "tokens_per_day": 1e9, "investment": 1000.0},
    ),
    "masked": (tiny.bert, "text", {}),
    "encoder": (lambda: tiny.bert("BertModel"), "text", {}),
    "classifier": (lambda: tiny.bert("BertForSequenceClassification", num_labels=3), "labels", {}),
    "pairs": (tiny.llama, "pairs", {"max_new_tokens": 6, "schemes": ()}),
    "translator": (tiny.t5, "pairs", {"max_new_tokens": 6}),
}  # fmt: skip


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """made(kind): its report, made at the first call. The machine's peaks are measured once for all of them."""
    found: dict[str, Made] = {}
    patch = pytest.MonkeyPatch()
    patch.setattr(roofline, "peaks", functools.cache(roofline.peaks))

    def make(kind: str) -> Made:
        if kind not in found:
            build, form, options = KINDS[kind]
            folder = tmp_path_factory.mktemp(kind)
            build().save_pretrained(folder / "weights")
            tiny.tokenizer().save_pretrained(folder / "weights")
            data = write(folder, form)
            loaded = load(str(folder / "weights"))
            settings = ReportSettings(**{**QUICK, "prompt_tokens": 16 if kind != "classifier" else 8, **options})
            report = make_report(
                loaded.model, loaded.tokenizer, data, settings, name=NAME, loading=loaded.code, command=["a b", "--x"],
                note="Loaded <b>so</b>.", progress=False,
            )  # fmt: skip
            found[kind] = Made(report, loaded.model, folder, data, settings)
        return found[kind]

    yield make
    patch.undo()


def write(folder: Path, form: str) -> Path:
    """A file of data of that form."""
    if form == "text":
        path = folder / "data.txt"
        path.write_text("\n\n".join(tiny.TEXTS * 3) + "\n")
        return path
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in {"pairs": PAIRS, "labels": LABELS}[form]))
    return path


def again(one: Made, section: str) -> dict[str, Any]:
    """What the lines of a section leave behind, run after those that come first."""
    names: dict[str, Any] = {}
    code = one.report.content["code"]
    with contextlib.redirect_stdout(None):
        exec(code["first"], names)
        exec(code[section], names)
    return names
