"""The suite's JSON, its plot and its table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmkern.evaluation.timing import markdown, seconds

Rows = Mapping[str, list[dict[str, Any]]]
STATUSES = ("passed", "measured", "skipped", "failed", "not reached")


def content(rows: Rows, options: dict[str, Any], took: float) -> dict[str, Any]:
    """What the JSON holds: docs/gpu_suite.md says what each key is."""
    machine = next((r["machine"] for r in rows.get("device", []) if "machine" in r), None)
    rates = next((r["rates"] for r in rows.get("device", []) if "rates" in r), None)
    return {
        "suite": 1,
        "options": options,
        "machine": machine,
        "rates": rates,
        "seconds": round(took, 1),
        "counts": {part: counts(found) for part, found in rows.items()},
        "parts": dict(rows),
    }


def counts(rows: list[dict[str, Any]]) -> dict[str, int]:
    return {s: n for s in STATUSES if (n := sum(r["status"] == s for r in rows))}


def table(rows: Rows) -> str:
    """How the parts went, the speeds, and every failure with the end of its traceback."""
    lines = [["part", *STATUSES]]
    for part, found in rows.items():
        of = counts(found)
        lines.append([part, *(str(of.get(s, 0)) for s in STATUSES)])
    text = markdown(lines)
    speeds = [["case", "contestant", "time", "20 to 80 %", "times the baseline", "of the peak"]]
    for row in (r for found in rows.values() for r in found if r.get("contestants")):
        for name, c in row["contestants"].items():
            ratio, share, time = c["ratio"], c["share_of_peak"], c["seconds"]
            over = f"{ratio['median']:.2f} ({row['baseline']})" if ratio else ""
            spread = f"{seconds(time['low'])} to {seconds(time['high'])}"
            of_peak = f"{share['median']:.0%}" if share else ""
            speeds.append([row["step"], name, seconds(time["median"]), spread, over, of_peak])
        speeds += [
            [row["step"], name, "not run", "", why.split("\n")[0][:60], ""] for name, why in row["failed"].items()
        ]
    if len(speeds) > 1:
        text += f"\n\n{markdown(speeds)}"
    for part, found in rows.items():
        for row in found:
            if row["status"] == "failed":
                told = (row.get("traceback") or row.get("stderr") or "").strip()
                text += f"\n\n{part}: {row['step']}: FAILED, {row.get('reason', '')}\n{told[-1500:]}"
    return text


def plot(rows: Rows, caption: str, path: Path) -> str | None:
    """Shares of the peak, a group of bars for each case. Returns why there is none, or None."""
    try:
        import matplotlib
    except ImportError:
        return "no plot: matplotlib is not installed"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = []
    for row in (r for found in rows.values() for r in found if r.get("contestants")):
        for name, c in row["contestants"].items():
            if c["share_of_peak"]:
                bars.append((f"{row['step']}: {name}", c["share_of_peak"], name.startswith("llmkern")))
    if not bars:
        return "no plot: nothing was measured"
    figure, axes = plt.subplots(figsize=(11, 1.5 + 0.22 * len(bars)), layout="constrained")
    middles = [100 * s["median"] for _, s, _ in bars]
    spread = [[max(100 * (s["median"] - s["low"]), 0.0) for _, s, _ in bars],
              [max(100 * (s["high"] - s["median"]), 0.0) for _, s, _ in bars]]  # fmt: skip
    colors = ["#3b6ea5" if own else "#b8b8b8" for *_, own in bars]
    axes.barh(range(len(bars)), middles, xerr=spread, color=colors, ecolor="#333333", capsize=2)
    axes.set_yticks(range(len(bars)), [label for label, *_ in bars], fontsize=6)
    axes.invert_yaxis()
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set_xlabel("percent of what the device reaches in copies and products, measured in the same run")
    figure.suptitle(caption, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return None
