"""The GPU suite: what the device is, the contract at full sizes, compute-sanitizer, graphs, benchmarks.

    python -m benchmarks.gpu [--out FOLDER] [--quick] [--only PART ...] [--minutes 9.5]

One command for whoever has a GPU, at most ten minutes. Each part runs in a process of its own within its share of the
time; what fails, crashes or hangs is told, and the rest goes on. Writes gpu.json and gpu.png (docs/gpu_suite.md).
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import results
from benchmarks.gpu.conduct import Limits, conduct, python
from benchmarks.gpu.steps import Part, Setting, read, run_steps

#: Each part's share of the time.
WEIGHTS = {"device": 1.0, "contract": 6.0, "graphs": 3.0, "speed": 7.0, "sanitizer": 5.0}
STEP_LIMIT = 150.0  # seconds that a step may take; the first call of a Triton kernel compiles it


def load(name: str) -> Part:
    """The function of a part, imported within its own process."""

    module = "device_rates" if name == "device" else name
    part: Part = importlib.import_module(f"benchmarks.gpu.{module}").part
    return part


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-suite"), metavar="FOLDER", help="default gpu-suite")
    parser.add_argument("--quick", action="store_true", help="fewer cases")
    parser.add_argument("--only", nargs="+", choices=WEIGHTS, metavar="PART", help=f"of {', '.join(WEIGHTS)}")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all parts together (default 9.5)")
    # Every line once without a GPU, at tiny sizes: its figures mean nothing.
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=WEIGHTS, help=argparse.SUPPRESS)  # what a part's own process is asked for
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    setting = Setting(options.device, options.quick)
    if options.part:
        done = {row["step"] for row in read(options.rows)}
        return run_steps(load(options.part), setting, options.rows, done, options.until)
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"benchmarks.gpu: torch {torch.__version__} sees no GPU", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    for old in (*options.out.glob("*.rows"), *options.out.glob("*.stderr")):
        old.unlink()
    own = ["--device", options.device, *(["--quick"] if options.quick else [])]

    def command(part: str, rows: Path, until: float) -> list[str]:
        return python("benchmarks.gpu", *own, "--part", part, "--rows", str(rows), "--until", str(until))

    def tell(text: str) -> None:
        print(text, flush=True)

    weights = {name: w for name, w in WEIGHTS.items() if not options.only or name in options.only}
    begin = time.time()
    rows = conduct(weights, command, options.out, Limits(60 * options.minutes, STEP_LIMIT), tell)
    chosen = {"quick": options.quick, "only": options.only, "minutes": options.minutes, "device": options.device}
    content = results.content(rows, chosen, time.time() - begin)
    path = options.out / "gpu.json"
    path.write_text(json.dumps(content, indent=1, default=str) + "\n")
    print(f"\n{results.table(rows)}\n")
    machine = content["machine"] or {}
    caption = f"{machine.get('gpu') or machine.get('processor')}, torch {machine.get('torch')}"
    if setting.tiny:
        caption += ": a try of the suite on a CPU, whose figures mean nothing"
    try:
        missing = results.plot(rows, caption, options.out / "gpu.png")
    except Exception as error:  # the figures are in the JSON
        missing = f"no plot: {type(error).__name__}: {error}"
    print(f"written: {path}" + (f"; {missing}" if missing else f", {options.out / 'gpu.png'}"))
    return 1 if any(row["status"] == "failed" for found in rows.values() for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())
