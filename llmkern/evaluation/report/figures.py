"""A figure of a report: where it stands in the JSON, and how it is written, everywhere the same way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: Units that take prefixes, from the largest, and what is written without one.
PREFIXED = {
    "bytes": ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")),
    "bytes/s": ((1e12, "TB/s"), (1e9, "GB/s"), (1e6, "MB/s"), (1e3, "kB/s"), (1.0, "B/s")),
    "flop": ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1e3, "kFLOP"), (1.0, "FLOP")),
    "flop/s": (
        (1e15, "PFLOP/s"), (1e12, "TFLOP/s"), (1e9, "GFLOP/s"), (1e6, "MFLOP/s"), (1e3, "kFLOP/s"), (1.0, "FLOP/s"),
    ),
    "time": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns")),
}  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A number of the report's JSON as it is written. pointer: where it stands there, a JSON Pointer (RFC 6901)."""

    text: str
    pointer: str
    unit: str


def figure(report: Mapping[str, Any], *path: str | int, unit: str) -> Figure:
    """The figure at a path into the JSON, in a unit of `shown`."""
    pointer = "".join("/" + str(key).replace("~", "~0").replace("/", "~1") for key in path)
    return Figure(shown(at(report, pointer), unit), pointer, unit)


def at(report: Any, pointer: str) -> Any:
    """What stands at a JSON Pointer. Raises KeyError or IndexError where nothing does."""
    for key in pointer.split("/")[1:]:
        key = key.replace("~1", "/").replace("~0", "~")
        report = report[int(key)] if isinstance(report, list) else report[key]
    return report


def shown(value: Any, unit: str) -> str:
    """A value of the JSON as text: a number, a spread (median, low, high), or None.

    unit: one of PREFIXED; "count", "times" (a ratio), "share" and "change" (percent, the latter with its sign),
    "points" (a signed difference), "score" (four digits), "cosine", "error", "ratio" (three
    digits), or "money" and a currency, "money EUR".
    """
    if value is None:
        return "not a number" if unit in ("score", "change", "points", "cosine") else "not told"
    if isinstance(value, Mapping):
        middle, *ends = (value["median"], value["low"], value["high"])
        if not all(isinstance(v, (int, float)) for v in (middle, *ends)):
            return shown(middle, unit)
        size, suffix = _prefix(middle, unit)
        texts = [_number(v / size, unit) for v in (middle, *ends)]
        same = texts[1] == texts[2] == texts[0]
        return (texts[0] if same else f"{texts[0]} ({texts[1]} to {texts[2]})") + suffix
    if isinstance(value, str):  # what JSON has no number for: infinite
        return value
    size, suffix = _prefix(value, unit)
    return _number(value / size, unit) + suffix


def _prefix(value: float, unit: str) -> tuple[float, str]:
    """What numbers of this size are divided by, and what follows them."""
    if unit in PREFIXED:
        steps = PREFIXED[unit]
        size, name = next(((s, n) for s, n in steps if abs(value) >= s * 0.9995), steps[-1])
        return (size, f" {name}") if value or unit != "time" else (1.0, " s")
    kind, _, currency = unit.partition(" ")
    return 1.0, {"share": " %", "change": " %"}.get(kind, f" {currency}" if kind == "money" and currency else "")


def _number(value: float, unit: str) -> str:
    kind = unit.partition(" ")[0]
    if kind == "count":
        return f"{value:,.0f}"
    if kind == "times":
        return f"{value:.2f}"
    if kind == "share":
        return _percent(value)
    if kind == "money" and abs(value) >= 1000:
        return f"{value:,.0f}"
    if kind in ("change", "points"):
        text = f"{100 * value:+.2f}" if kind == "change" else f"{value:+.4f}"
        return text if float(text) else text[1:]  # nothing has no sign
    if kind == "cosine":
        return f"{value:.5f}"
    if kind == "error":
        return f"{value:.2e}"
    return digits(value, 4 if kind == "score" else 3)


def _percent(value: float) -> str:
    """Without a decimal unless it is small, or so near to all of it that it would be written as all."""
    if 0 < value < 0.1:
        return f"{100 * value:.2g}"
    texts = [f"{100 * value:.{places}f}" for places in range(5)]
    return texts[0] if value == 1 else next((t for t in texts if float(t) != 100), texts[0])


def digits(value: float, count: int) -> str:
    """So many significant digits, without an exponent unless it is very small."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    places = count - 1 - math.floor(math.log10(abs(value)))
    if places > 9:
        return f"{value:.{count - 1}e}"
    rounded = round(value, places)
    places = max(0, count - 1 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:,.{places}f}"
