"""The roofline plot of a report's JSON, as SVG whose colours follow the page, light or dark."""

from __future__ import annotations

import io
import math
import re
from typing import Any

from llmkern.evaluation.report.figures import shown
from llmkern.evaluation.report.summary import TITLES

#: What matplotlib is given for a colour, and the variable of the page's style that takes its place.
INK, SOFT, LINE = "#010203", "#040506", "#070809"
MODELS = ("#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05", "#0a0b06")
VARIABLES = {
    INK: "--ink", SOFT: "--soft", LINE: "--line", **{c: f"--model-{i}" for i, c in enumerate(MODELS)},
}  # fmt: skip
MARKERS = {"prefill": "o", "decode": "s", "training": "^"}
SIZE = (4.7, 4.3)  # inches; a unit of the picture is a 72nd, so that a phone shows the text at about its size


def colour_of(number: int) -> str:
    return MODELS[number % len(MODELS)]


def svg(report: dict[str, Any], title: str, alt: str, style: str = "") -> str | None:
    """The plot as one <svg> element, or None without matplotlib or points. style: CSS that stands in it."""
    told = report["roofline"]
    if not told.get("points"):
        return None
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        return None
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "llmkern", "font.size": 10, "font.family": "sans-serif"}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=SIZE)
        FigureCanvasSVG(figure)
        below = 0.145 + 0.055 * _legend(figure, report)
        _draw(figure.add_axes((0.16, below, 0.81, 0.97 - below)), report)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None,
                                                                     "Type": None})  # fmt: skip
    return _embedded(out.getvalue(), title, alt, style)


def _draw(axes: Any, report: dict[str, Any]) -> None:
    told, names = report["roofline"], report["models"]
    peaks, points = told["peaks"], told["points"]
    kinds = list(dict.fromkeys(p["kind"] for p in points))
    ridges = [peaks[kind] / peaks["memory"] for kind in kinds]
    left = min([p["intensity"] for p in points] + ridges) / 3
    right = max([p["intensity"] for p in points] + ridges) * 4
    lowest = min([p["flops_per_second"]["low"] for p in points] + [left * peaks["memory"]])
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(lowest / 2, max(peaks[k] for k in kinds) * 3))
    axes.plot([left, max(ridges)], [left * peaks["memory"], max(ridges) * peaks["memory"]], color=INK, linewidth=1.3)
    angle = _angle(axes)
    start = left * 1.15
    axes.text(start, start * peaks["memory"] * 1.12, f"memory {shown(peaks['memory'], 'bytes/s')}", color=SOFT,
              rotation=angle, rotation_mode="anchor", fontsize=9)  # fmt: skip
    for kind, ridge in zip(kinds, ridges, strict=True):
        axes.plot([ridge, right], [peaks[kind]] * 2, color=INK, linewidth=1.3)
        x, side, y, up = _free(axes, (ridge * 1.3, right / 1.05), peaks[kind], points)
        axes.text(x, y, f"{kind} {shown(peaks[kind], 'flop/s')}", color=SOFT, ha=side, va=up, fontsize=9)
    for point in points:
        reached, colour = point["flops_per_second"], colour_of(names.index(point["model"]))
        x = point["intensity"]
        axes.plot([x, x], [reached["low"], reached["high"]], color=colour, linewidth=1.2)
        # The first model is a ring, through which one that is as fast is seen.
        ring = {"markersize": 11, "markerfacecolor": "none", "markeredgewidth": 1.8}
        filled = {"markersize": 7, "markeredgewidth": 0}
        shape = ring if point["model"] == names[0] else filled
        axes.plot([x], [reached["median"]], MARKERS[point["phase"]], color=colour, **shape)
    axes.set_xlabel("FLOP per byte", color=SOFT)
    axes.set_ylabel("FLOP per second", color=SOFT)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: _decade(value))
    axes.minorticks_off()
    axes.tick_params(colors=SOFT, length=3)
    axes.grid(True, color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(LINE)


def _free(axes: Any, ends: tuple[float, float], roof: float, points: list[dict[str, Any]]) -> tuple[Any, ...]:
    """Where a roof's label hides no point: at its right or left end, above it or below, with its alignment."""
    taken = [axes.transData.transform((p["intensity"], p["flops_per_second"]["median"])) for p in points]
    best, found = -1.0, (ends[1], "right", roof * 1.1, "bottom")
    for x, side, inwards in ((ends[1], "right", -50), (ends[0], "left", 50)):
        for y, up, away in ((roof * 1.1, "bottom", 6), (roof / 1.1, "top", -6)):
            across, high = axes.transData.transform((x, y))
            # A label is wide and not high.
            rooms = [max(abs(a - across - inwards) / 60, abs(b - high - away) / 12) for a, b in taken]
            room = min(rooms, default=9.0)
            if room > best and best < 1.5:  # the first that is far enough
                best, found = room, (x, side, y, up)
    return found


def _decade(value: float) -> str:
    """A power of ten with its prefix: 10 G."""
    size, prefix = next(((s, p) for s, p in ((1e12, " T"), (1e9, " G"), (1e6, " M")) if value >= 0.99 * s), (1.0, ""))
    return f"{value / size:g}{prefix}"


def _angle(axes: Any) -> float:
    """Degrees at which a decade right and a decade up rises in the picture."""
    (x0, y0), (x1, y1) = (axes.transData.transform(p) for p in ((1.0, 1.0), (10.0, 10.0)))
    return math.degrees(math.atan2(y1 - y0, x1 - x0))


def _legend(figure: Any, report: dict[str, Any]) -> int:
    """Colours are models, shapes are phases; returns how many lines it has."""
    from matplotlib.lines import Line2D

    points = report["roofline"]["points"]
    shown_models = [n for n in report["models"] if any(p["model"] == n for p in points)]
    bar = [Line2D([], [], color=colour_of(report["models"].index(n)), linewidth=6, label=n) for n in shown_models]
    phases = dict.fromkeys(p["phase"] for p in points)
    shape = [Line2D([], [], color=SOFT, marker=MARKERS[p], linestyle="", label=TITLES[p]) for p in phases]
    options = {"frameon": False, "labelcolor": INK, "fontsize": 10, "loc": "upper left", "handlelength": 1.0,
               "columnspacing": 1.2, "borderpad": 0.0}  # fmt: skip
    columns = 3 if len(bar) <= 3 else 2
    lines = -(-len(bar) // columns)
    figure.legend(handles=bar, bbox_to_anchor=(0.02, 0.065 + 0.055 * lines), ncols=columns, **options)
    figure.legend(handles=shape, bbox_to_anchor=(0.02, 0.06), ncols=3, **options)
    return lines + 1


def _embedded(text: str, title: str, alt: str, style: str) -> str:
    """What an HTML page can hold: no prologue, ids of its own, colours by variables, a name and a description."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r'\bid="', 'id="plot-', text)
    text = re.sub(r'xlink:href="#', 'href="#plot-', text)
    text = text.replace("url(#", "url(#plot-")
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    text = re.sub(r"font(-family)?: [^;\"]*sans-serif", _inherited, text)
    head = re.search(r'viewBox="([^"]*)"', text)
    assert head is not None
    root = (
        f'<svg class="roofline" role="img" aria-labelledby="plot-title plot-desc" viewBox="{head[1]}" '
        'xmlns="http://www.w3.org/2000/svg">'
    )
    named = f'<title id="plot-title">{_escaped(title)}</title><desc id="plot-desc">{_escaped(alt)}</desc>'
    sheet = f"<style>{style} .roofline path {{ stroke-linejoin: round; stroke-linecap: butt }}</style>"
    return root + named + sheet + text[text.index(">") + 1 :].strip()


def _inherited(found: re.Match[str]) -> str:
    """A font by its size alone."""
    size = re.search(r"(\d+(?:\.\d+)?)px", found[0])
    return f"font-size: {size[1]}px" if size else "font-family: inherit"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
