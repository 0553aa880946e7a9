"""What a report shows, made of its JSON alone: sections of paragraphs, tables and figures, before any markup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmkern.evaluation.report.figures import Figure

#: A paragraph or the content of a cell: text, figures, or both.
Piece = str | Figure
Content = Piece | Sequence[Piece]


@dataclass(frozen=True)
class Paragraph:
    content: Content
    note: bool = False  #: of less weight: how something is counted


@dataclass(frozen=True)
class Table:
    """caption: names it, also to those who do not see it. folded: what it says in one line, and the rest on demand."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Content]]
    folded: str = ""


@dataclass(frozen=True)
class Cards:
    """The figures that count, of each model: title, and labels with their figures."""

    caption: str
    cards: Sequence[tuple[str, Sequence[tuple[str, Content]]]]


@dataclass(frozen=True)
class Code:
    """title: what it is, folded away behind it. language: "python" or "sh"."""

    title: str
    text: str
    language: str = "python"


@dataclass(frozen=True)
class Plot:
    """The roofline. alt: what it shows, in words."""

    title: str
    alt: str


Block = Paragraph | Table | Cards | Code | Plot


@dataclass(frozen=True)
class Section:
    key: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    title: str
    subtitle: str
    sections: Sequence[Section]
    foot: Sequence[str]


def pieces(content: Content) -> list[Piece]:
    return [content] if isinstance(content, (str, Figure)) else list(content)


def page(report: dict[str, Any]) -> Page:
    """The page of a report's JSON."""
    from llmkern.evaluation.report import findings, made, measured, summary

    model, machine = report["model"], report["machine"]
    sections = [
        summary.section(report),
        findings.replaced(report),
        findings.equivalence(report),
        findings.quality(report),
        measured.speed(report),
        measured.memory(report),
        measured.cost(report),
        measured.roofline(report),
        made.section(report),
    ]
    commit = f", commit {machine['commit']}" if machine["commit"] else ""
    foot = [f"llmkern {machine['llmkern']}{commit}, torch {machine['torch']}, {machine['date']}"]
    where = f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores"
    subtitle = f"{model['class']} in {model['dtype']}, before and after llmkern. Measured on {where}."
    return Page(model["name"], subtitle, sections, foot)


def again(report: dict[str, Any], key: str) -> Code:
    """The lines that make a section's figures again."""
    return Code("Make these figures again", report["code"][key])


def counted(number: int, one: str, several: str = "") -> str:
    return f"{number} {one if number == 1 else several or one + 's'}"
