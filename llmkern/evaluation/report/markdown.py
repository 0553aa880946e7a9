"""A report's page as Markdown."""

from __future__ import annotations

import re

from llmkern.evaluation import timing
from llmkern.evaluation.report.figures import Figure
from llmkern.evaluation.report.view import Block, Cards, Code, Content, Page, Paragraph, Plot, Table, pieces


def render(page: Page, plot: str | None) -> str:
    """plot: the name of the file of the plot beside it; None where there is none."""
    lines = [f"# {escaped(page.title)}", escaped(page.subtitle)]
    for section in page.sections:
        lines.append(f"## {escaped(section.title)}")
        lines += [text for block in section.blocks if (text := _block(block, plot))]
    return "\n\n".join([*lines, "---", *map(escaped, page.foot)]) + "\n"


def escaped(text: str) -> str:
    """As text, whatever Markdown means by its characters, in one line."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(text.split()))


def written(content: Content) -> str:
    """Figures and text, one behind the other; a text's own spaces at its ends stay."""
    found = ""
    for piece in pieces(content):
        if isinstance(piece, Figure):
            found += escaped(piece.text)
        else:
            found += re.sub(r"([\\`*\[\]<>|])", r"\\\1", re.sub(r"\s", " ", piece))
    return found.strip()


def _block(block: Block, plot: str | None) -> str:
    if isinstance(block, Paragraph):
        return written(block.content)
    if isinstance(block, Table):
        table = timing.markdown([[written(c) for c in line] for line in [block.head, *block.rows]])
        return f"**{escaped(block.caption)}**\n\n{table}"
    if isinstance(block, Cards):
        labels = list(dict.fromkeys(label for _, figures in block.cards for label, _ in figures))
        rows = [
            [escaped(name), *(written(dict(figures).get(label, "")) for label in labels)]
            for name, figures in block.cards
        ]
        return timing.markdown([["model", *map(escaped, labels)], *rows])
    if isinstance(block, Code):
        title = f"{escaped(block.title)}:\n\n" if block.title else ""
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", block.text)), default=0))
        return f"{title}{fence}{block.language}\n{block.text}\n{fence}"
    assert isinstance(block, Plot)
    return f"![{escaped(block.alt)}]({plot})" if plot else ""
