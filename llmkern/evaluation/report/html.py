"""A report's page as HTML that asks for nothing outside itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmkern.evaluation.report import plot
from llmkern.evaluation.report.figures import Figure
from llmkern.evaluation.report.view import Content, Page, Plot, Table, pieces

HERE = Path(__file__).parent
NO_PLOT = "The plot needs matplotlib (pip install matplotlib); its points are in the table."


def render(page: Page, report: dict[str, Any]) -> str:
    """Raises ImportError without jinja2."""
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError as error:
        raise ImportError(f'expected jinja2, which pip install "llmkern[report]" brings: {error}') from error
    shown = [block for section in page.sections for block in section.blocks if isinstance(block, Plot)]
    drawn = plot.svg(report, shown[0].title, shown[0].alt) if shown else None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["pieces"] = pieces
    environment.tests["figure"] = lambda piece: isinstance(piece, Figure)
    return environment.get_template("page.html").render(
        page=page,
        kind=lambda block: type(block).__name__,
        numeric=numeric,
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        plot=None if drawn is None else Markup(drawn),
        no_plot=NO_PLOT,
        models=report["models"],
    )


def numeric(table: Table) -> Sequence[bool]:
    """Of each column, whether it holds figures."""
    return [any(_is_figure(row[i]) for row in table.rows) for i in range(len(table.head))]


def _is_figure(content: Content) -> bool:
    return isinstance(content, Figure)


def standalone_plot(report: dict[str, Any], title: str, alt: str) -> str | None:
    """The plot as a file of its own, with the page's colours."""
    sheet = (HERE / "page.css").read_text(encoding="utf-8")
    colours = sheet[: sheet.index("/* the page */")]
    return plot.svg(report, title, alt, colours + "svg { font-family: system-ui, sans-serif }")
