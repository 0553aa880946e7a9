"""`make_report`, and the report that it makes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from llmkern.evaluation.report.data import Data, read_data
from llmkern.evaluation.report.settings import ReportSettings


@dataclass(frozen=True)
class EvaluationReport:
    """What an evaluation found, as plain values: `content` is the JSON, and the page is made of that alone."""

    content: dict[str, Any]

    @classmethod
    def from_json(cls, text: str) -> EvaluationReport:
        """The report of a report.json."""
        return cls(json.loads(text))

    def to_json(self) -> str:
        """All figures unrounded, with every module, layer and row of the contract."""
        return json.dumps(self.content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def to_markdown(self, plot: str | None = None) -> str:
        """The page as Markdown. plot: the name of the file of the roofline plot beside it, where there is one."""
        from llmkern.evaluation.report import markdown, view

        return markdown.render(view.page(self.content), plot)

    def to_html(self) -> str:
        """The page as HTML in one piece, without a request to anywhere. Raises ImportError without jinja2."""
        from llmkern.evaluation.report import html, view

        return html.render(view.page(self.content), self.content)

    def plot(self) -> str | None:
        """The roofline plot as SVG; None without matplotlib, or where nothing was measured."""
        from llmkern.evaluation.report import html, view

        shown = [b for s in view.page(self.content).sections for b in s.blocks if isinstance(b, view.Plot)]
        return html.standalone_plot(self.content, shown[0].title, shown[0].alt) if shown else None

    def save(self, folder: str | Path) -> list[Path]:
        """Writes report.html, report.md, report.json and roofline.svg into a folder, which is made where it is not."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(self.to_json(), encoding="utf-8")  # first: all else can be made of it
        plot = self.plot()
        texts = {"report.html": self.to_html(), "report.md": self.to_markdown("roofline.svg" if plot else None)}
        if plot:
            texts["roofline.svg"] = plot
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        return [folder / name for name in ("report.html", "report.md", "report.json", *list(texts)[2:])]


def make_report(
    model: nn.Module,
    tokenizer: Any,
    data: str | Path | Data,
    settings: ReportSettings | None = None,
    *,
    name: str = "",
    loading: str = "published, tokenizer = ...  # the model as it was given",
    note: str = "",
    command: Sequence[str] | None = None,
    stage: Callable[[str], Any] | None = None,
    progress: bool = True,
) -> EvaluationReport:
    """Measures a model as published, kernelized and in int8: what was replaced, the contract, quality, speed, memory,
    cost, and where it stands under this machine's roof.

    model: of transformers, not kernelized or quantised yet; it stays as it is. tokenizer: its own. data: a file that
    `read_data` reads, or what it gave: text for a decoder (perplexity), an encoder with the head of a masked language
    model (pseudo-perplexity) or without a head (cosines of embeddings), prompts with references for a decoder or an
    encoder-decoder (BLEU, ROUGE), texts with labels for a classifier (accuracy, F1).

    name: of the model; by default its class. loading: the lines of Python that load it as `published`, and its
    `tokenizer`, which the report tells beside those that make its figures again. note: a sentence of its own in the
    summary. command: the arguments of the command line that asked for it. stage: called with what is measured next.
    progress: bars where stderr is a terminal.

    The models share the memory of whatever is not quantised. Raises TypeError where model is no module, ValueError for
    data that says nothing of such a model, and the errors of `read_data` and `ReportSettings`. What cannot be measured
    of a model stands with its reason in its place.
    """
    from llmkern.evaluation.report.collect import collect

    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if tokenizer is None:
        raise TypeError("tokenizer: expected the model's, got None")
    return EvaluationReport(
        collect(
            model, tokenizer, data if isinstance(data, Data) else read_data(data), settings or ReportSettings(),
            name=name or type(model).__name__, loading=loading, note=note,
            command=None if command is None else list(command), stage=stage or (lambda what: None), progress=progress,
        )
    )  # fmt: skip
