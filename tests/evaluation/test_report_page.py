"""A report's page: figures as in the JSON, no request to anywhere, well formed, and readable in a browser."""

from __future__ import annotations

import copy
import re
import sys
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import pytest

from llmkern.evaluation.report import EvaluationReport, html, view
from llmkern.evaluation.report.figures import Figure, at, figure, shown
from llmkern.evaluation.report.markdown import escaped
from tests.evaluation import browser
from tests.evaluation.conftest import KINDS, NAME

VOID = {"meta", "link"}


class Page(HTMLParser):
    """Elements as they open and close, with the texts of what is marked as a figure."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.figures: list[tuple[str, str, str]] = []  # pointer, unit, text
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1][0] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for tag, attrs in self.open:
            self.texts[tag][-1] += data
            if "data-json" in attrs:
                self.figures.append((attrs["data-json"], attrs["data-unit"], data))


@pytest.mark.parametrize("kind", KINDS)
def test_every_figure_is_the_jsons(made, kind):
    report = made(kind).report
    page = Page(report.to_html())
    assert len(page.figures) > 30
    for pointer, unit, text in page.figures:
        assert text == shown(at(report.content, pointer), unit), pointer
    of_view = [piece for piece in _pieces(view.page(report.content)) if isinstance(piece, Figure)]
    assert [(f.pointer, f.unit, f.text) for f in of_view] == page.figures
    # Markdown has them in the same order.
    rest = report.to_markdown()
    for f in of_view:
        assert escaped(f.text) in rest, f
    cells = [c.strip() for line in rest.splitlines() if line.startswith("|") for c in re.split(r"(?<!\\)\|", line)]
    for table in (b for s in view.page(report.content).sections for b in s.blocks if isinstance(b, view.Table)):
        for row in table.rows:
            assert all(escaped(c.text) in cells for c in row if isinstance(c, Figure))


def _pieces(page: view.Page) -> Any:
    for section in page.sections:
        for block in section.blocks:
            if isinstance(block, view.Paragraph):
                yield from view.pieces(block.content)
            elif isinstance(block, view.Table):
                for row in block.rows:
                    for cell in row:
                        yield from view.pieces(cell)
            elif isinstance(block, view.Cards):
                for _, figures in block.cards:
                    for _, value in figures:
                        yield from view.pieces(value)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_outside_is_asked_for(made, kind):
    text = made(kind).report.to_html()
    page = Page(text)
    assert not {tag for tag, _ in page.elements} & {"script", "iframe", "object", "embed", "base", "img", "form"}
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "poster", "data", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith("#") or value == "data:,", (tag, name, value)
        assert not any(name.startswith("on") for name in attributes)
    assert all(inside.startswith("#") for inside in re.findall(r"url\(['\"]?([^)]*)", text))
    assert "@import" not in text and "@font-face" not in text
    # Names of namespaces are the only addresses.
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) <= {"http://www.w3.org/2000/svg"}


def test_what_a_reader_of_the_page_is_told(made):
    text = made("decoder").report.to_html()
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>") and ("html", {"lang": "en"}) in page.elements
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b <= a + 1 for a, b in pairwise(levels))
    heads = [attributes for tag, attributes in page.elements if tag == "th"]
    assert heads and all(attributes["scope"] in ("col", "row") for attributes in heads)
    assert all(head.strip() for head in page.texts["th"])
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    for _, attributes in page.elements:
        for name in (attributes.get("aria-labelledby") or "").split():
            assert name in ids
        if (attributes.get("href") or "").startswith("#"):
            assert attributes["href"][1:] in ids
    svg = next(attributes for tag, attributes in page.elements if tag == "svg")
    assert svg["role"] == "img" and "GFLOP/s at" in page.texts["desc"][0].replace("MFLOP/s", "GFLOP/s")
    assert "prefers-color-scheme: dark" in text


def test_names_are_text_and_nothing_else(made):
    report = made("decoder").report
    text = report.to_html()
    page = Page(text)
    assert page.texts["h1"] == [NAME] and "<script" not in text and "<b>so" not in text
    assert "Loaded <b>so</b>." in page.texts["p"]
    markdown = report.to_markdown()
    assert markdown.startswith(r"# a \<script\>alert(1)\</script\> \| \`model\` & \*more\*" + "\n")
    # As many cells in each row as in the head of its table.
    rows = [len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0 for line in markdown.splitlines()]
    assert all(a == b or 0 in (a, b) for a, b in pairwise(rows)) and max(rows) > 4


def test_the_plot_is_one_of_its_own_too(made):
    svg = made("decoder").report.plot()
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.attrib["viewBox"]
    assert "#0a0b" not in svg and "#010203" not in svg  # all colours are the page's
    texts = [t.text for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"FLOP per byte", "published", "int8 row", "decode"} <= set(texts)
    assert "xlink" not in svg and "DejaVu" not in svg and "--model-1: #" in svg


def test_without_matplotlib_a_sentence_stands_in_its_place(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report = made("decoder").report
    text = report.to_html()
    assert html.NO_PLOT in text and "<svg" not in text and report.plot() is None
    assert "roofline.svg" not in report.to_markdown()


def test_what_failed_says_why_in_its_place(made):
    content = {**made("decoder").report.content}
    content["equivalence"] = {**content["equivalence"], "failed": "RuntimeError: no <b>"}
    content["equivalence"].pop("passed")
    content["speed"] = {**content["speed"], "failed": "ValueError: no time"}
    content["speed"].pop("phases")
    content["cost"] = {**content["cost"], "phases": {}, "machine": None}
    content["cost"].pop("service")
    content["roofline"] = {"failed": "no speed was measured"}
    quality = {**content["quality"], "failed": {"int8 row": "IndexError: here"}}
    quality["models"] = {n: v for n, v in quality["models"].items() if n != "int8 row"}
    content["quality"] = quality
    report = EvaluationReport(content)
    failing = copy.deepcopy(quality)
    failing["failed"]["published"] = "KeyError: there"
    failing["models"].pop("published")
    for figures in failing["models"].values():
        figures.pop("perplexity_change")
    assert "KeyError: there" in EvaluationReport({**content, "quality": failing}).to_html()
    for text in (report.to_html(), report.to_markdown()):
        for reason in ("RuntimeError: no", "ValueError: no time", "IndexError: here", "no speed was measured"):
            assert reason in text
    assert "was not timed" in report.to_markdown()


SHOWN = {
    (0.0123, "time"): "12.3 ms", (0.9999, "time"): "1.00 s", (0, "time"): "0 s", (3.2e-10, "time"): "0.320 ns",
    (90868376, "bytes"): "90.9 MB", (999.9, "bytes"): "1.00 kB", (0, "bytes"): "0 B",
    (134515008, "count"): "134,515,008", (1.005e12, "flop/s"): "1.00 TFLOP/s", (0.876, "share"): "88 %",
    (0.9967, "share"): "99.7 %", (0.99995, "share"): "99.995 %",
    (1.002, "share"): "100.2 %", (0.994, "share"): "99 %",
    (1 - 1e-9, "share"): "100 %", (1234567.8, "money EUR"): "1,234,568 EUR", (999.4, "money"): "999",
    (None, "score"): "not a number",
    (0.0123, "share"): "1.2 %", (1, "share"): "100 %", (0.0058, "change"): "+0.58 %", (-1e-9, "change"): "0.00 %",
    (-0.0123, "points"): "-0.0123", (38.3349, "score"): "38.33", (123456.0, "score"): "123,500",
    ("infinite", "score"): "infinite", (None, "bytes"): "not told", (9.996, "ratio"): "10.0",
    (0.00736, "money EUR"): "0.00736 EUR", (1.5, "money"): "1.50", (4.81e-5, "error"): "4.81e-05",
    (2.0, "times"): "2.00",
}  # fmt: skip


@pytest.mark.parametrize(("value", "unit"), SHOWN)
def test_figures_are_written_one_way(value, unit):
    assert shown(value, unit) == SHOWN[value, unit]


def test_a_spread_has_the_unit_of_its_median():
    spread = {"median": 0.0552, "low": 0.00541, "high": 1.2}
    assert shown(spread, "time") == "55.2 (5.41 to 1,200) ms"
    assert shown({"median": 2.0, "low": 2.0, "high": 2.0}, "times") == "2.00"
    told = figure({"a/b": [{"x~y": 3}]}, "a/b", 0, "x~y", unit="count")
    assert told == Figure("3", "/a~1b/0/x~0y", "count") and at({"a/b": [{"x~y": 3}]}, told.pointer) == 3


@pytest.mark.skipif(bool(browser.MISSING), reason=browser.MISSING)
def test_in_a_browser(made, tmp_path):
    pages = []
    for kind in KINDS:
        path = tmp_path / f"{kind}.html"
        path.write_text(made(kind).report.to_html(), encoding="utf-8")
        pages.append(path)
    pages.append(tmp_path / "long.html")
    pages[-1].write_text(_lengthened(made("decoder").report).to_html(), encoding="utf-8")
    papers = set()
    with browser.Browser() as chromium:
        for path in pages:
            for width in (360, 1280):
                for scheme in ("light", "dark") if path.stem in ("decoder", "long") else ("light",):
                    chromium.open(path, width, 800, scheme)
                    chromium.run("document.querySelectorAll('details').forEach(d => d.open = true)")
                    wide, inner = chromium.run("return [document.documentElement.scrollWidth, innerWidth]")
                    assert inner == width and wide <= width, (path.name, width)
                    assert chromium.log("browser") == []
                    assert chromium.requests() == [path.absolute().as_uri()]
                    papers.add((scheme, chromium.run("return getComputedStyle(document.body).backgroundColor")))
                    box = chromium.run(
                        "const s = document.querySelector('svg.roofline').getBoundingClientRect();"
                        "const t = document.querySelector('svg.roofline text').getBoundingClientRect();"
                        "return [s.width, s.height, t.height]"
                    )
                    assert box[0] > 250 and box[1] > 200 and box[2] > 7
                    # What is wider than its place scrolls within it, and can be reached by the keyboard.
                    hidden = chromium.run(
                        "return [...document.querySelectorAll('.scroll, pre')]"
                        ".filter(e => e.scrollWidth > e.clientWidth && (e.tabIndex < 0 || "
                        "!['auto', 'scroll'].includes(getComputedStyle(e).overflowX))).length"
                    )
                    assert hidden == 0
                    assert _contrast(chromium) >= 4.5
    assert len(papers) == 2


def _lengthened(report: EvaluationReport) -> EvaluationReport:
    """With names that have nowhere to break, and amounts of many digits."""
    content = copy.deepcopy(report.content)
    content["model"]["name"] = content["model"]["class"] = "x" * 150
    content["data"]["file"] = "/" + "y" * 150
    content["equivalence"]["rows"][0]["name"] = "z" * 150
    content["cost"]["currency"] = "doubloons"
    for models in content["cost"]["phases"].values():
        for one in models.values():
            one["per_million_tokens"] = {"median": 123456789.0, "low": 0.000123456, "high": 987654321.0}
    return EvaluationReport(content)


def _contrast(chromium: browser.Browser) -> float:
    """The least contrast of a text with what is behind it, as WCAG 2 counts it."""
    return chromium.run("""
        const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(v => v / 255)
            .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
        const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
            if (c !== 'rgba(0, 0, 0, 0)') return light(c); } return 1; };
        return Math.min(...[...document.querySelectorAll('h1, h2, h3, p, td, th, dt, dd, a, summary, code, figcaption')]
            .map(e => [light(getComputedStyle(e).color), behind(e)])
            .map(([a, b]) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)));
    """)
