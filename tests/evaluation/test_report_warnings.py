"""What a report's summary says of models that are not what their names say."""

from __future__ import annotations

import copy

import pytest
import torch

from llmkern.evaluation.report import EvaluationReport, ReportSettings, make_report
from tests.evaluation import tiny
from tests.evaluation.conftest import write

QUICK = ReportSettings(rounds=1, prompt_tokens=8, tokens=30, schemes=("row",))


def summary(report):
    text = report.to_markdown()
    return text[: text.index("## What was replaced")]


def test_layers_that_int8_does_not_know(tmp_path):
    report = make_report(tiny.gpt2(), tiny.tokenizer(), write(tmp_path, "text"), QUICK, progress=False)
    count = report.content["replaced"]["int8"]["int8"]["count"]
    assert f"It is NOT in int8: 0 of {count} linear layers were replaced." in summary(report)
    assert "It is NOT in int8" in report.to_html()


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite(weight, tmp_path):
    model = tiny.llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(weight)
    report = make_report(model, tiny.tokenizer(), write(tmp_path, "text"), QUICK, progress=False)
    said = summary(report)
    assert "is the published model by" not in said and "published model are not finite" in said
    assert "perplexity is not a number: its outputs are not finite" in said and "not told" not in said


def test_what_could_not_be_measured(made):
    content = copy.deepcopy(made("decoder").report.content)
    content["equivalence"]["failed"] = "RuntimeError: no"
    content["quality"]["models"].pop("int8 row")
    content["quality"]["failed"] = {"int8 row": "IndexError: here"}
    said = summary(EvaluationReport(content))
    assert "whether it keeps the numerical contract could not be measured" in said
    assert "the perplexity of the int8 row model could not be measured" in said
    assert "beside copies that kernels pack of int8 weights, which are not counted" in said
    content["equivalence"] = {**made("decoder").report.content["equivalence"], "passed": False}
    assert "it does NOT keep the numerical contract" in summary(EvaluationReport(content))
