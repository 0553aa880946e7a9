"""`python -m llmkern`: what was built, what serves each operator on this machine and why, and how to get more.

`python -m llmkern inspect`: what the compilers make of the GPU kernels (llmkern/inspect).
`python -m llmkern report MODEL --data FILE`: what a model loses and gains, as one page (llmkern/evaluation/report).
`python -m llmkern serve MODEL`: a server of Hugging Face models on the kernels (llmkern/models/serve.py).
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from typing import Any

import torch

import llmkern
from llmkern import backend, extension
from llmkern.backend import Operator
from llmkern.evaluation.machine import processor
from llmkern.int8 import cost

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _serving(library: Any) -> str:
    active = library.active_isa()
    base = library.isa_base(active)
    return f"{active} serves" if base == active else f"{base} serves, and {active} int8"


def build_lines() -> list[str]:
    """The compiled library: instruction sets, threads, CUDA."""
    lines = [
        f"llmkern {llmkern.__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        f"processor      {processor()}, {torch.get_num_threads()} threads",
    ]
    library = extension._C
    if library is None:
        return [*lines, f"library        missing: {extension.MISSING}"]
    forced = " (forced by LLMKERN_ISA)" if os.environ.get("LLMKERN_ISA") else ""
    missing = [isa for isa in library.built_isas() if isa not in library.supported_isas()]
    lines += [
        f"library        {library.__file__}",
        f"instructions   {_serving(library)}{forced}; built: {', '.join(library.built_isas())}"
        + (f"; this processor lacks {', '.join(missing)}" if missing else ""),
        f"threads        {library.parallel_source()}",
    ]
    if library.cuda_architectures:
        lines.append(f"CUDA kernels   built for {library.cuda_architectures}")
    else:
        lines.append(
            f"CUDA kernels   not built: {library.cuda_missing}. To get them: install a CUDA toolkit, 12.8 or newer, "
            "put its nvcc on PATH (or set CUDA_HOME), and run `pip install -e .` again, without LLMKERN_CUDA=0"
        )
    if importlib.util.find_spec("triton"):
        lines.append("Triton         installed" + ("" if torch.cuda.is_available() else "; its kernels need a GPU"))
    else:
        lines.append("Triton         not installed: `pip install triton` gives the Triton kernels (Linux)")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch sees"
    return [*lines, f"GPU            {gpu}"]


def operator_lines() -> list[str]:
    """For each operator and device, which backend serves a typical call of each dtype, and why not an earlier one."""
    lines = ["", f"{'operator':<30}{'device':<8}{'dtype':<10}served by"]
    for name, operator in sorted(Operator.all.items()):
        for device in [d for d in operator.by_device if d != "other"]:
            for dtype in DTYPES:
                reasons = operator.reasons(device, dtype)
                if backend._forced is not None:  # it serves a call or raises
                    reasons = [r for r in reasons if r[0] == backend._forced] or [
                        (backend._forced, "there is no such kernel of this operator")
                    ]
                refused = [f"{b}: {why}" for b, why in reasons if why is not None]
                served = next((b for b, why in reasons if why is None), "nothing")
                before = [b for b, _ in reasons].index(served) if served != "nothing" else len(reasons)
                earlier = "; ".join(refused[:before])
                label = str(dtype).removeprefix("torch.")
                lines.append(f"{name:<30}{device:<8}{label:<10}{served}" + (f"  ({earlier})" if earlier else ""))
    return lines


def preference_lines() -> list[str]:
    """Which of CUDA C++ and Triton comes first where both have a kernel, and why."""
    lines = ["", f"{'operator':<30}{'capability':<18}{'shapes':<18}{'first on a GPU':<16}because"]
    for p in backend.PREFERENCES:
        lines.append(f"{p.operator:<30}{p.capabilities:<18}{p.shapes:<18}{p.backend:<16}{p.reason}")
    return lines


def cost_lines() -> list[str]:
    """What linear layers cost here, in floating point and in int8: the model by which quantize_model leaves layers."""
    lines = [
        "",
        "Linear layers on one thread, measured now; quantize_model leaves what int8 would not make faster:",
    ]
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        floating, int8 = cost.rates(dtype)
        lines += [f"{name:<15}torch: {floating}", f"{'':<15}int8:  {int8}"]
        sizes = [(384, 384), (768, 768), (768, 3072), (4096, 4096)]
        for rows in cost.ROWS:
            gains = [f"{floating.seconds(rows, *s) / int8.seconds(rows, *s):.1f} at {s[0]}x{s[1]}" for s in sizes]
            lines.append(f"{'':<15}{rows} rows: {', '.join(gains)} times as fast in int8")
    return lines


def main() -> None:
    if sys.argv[1:2] == ["inspect"]:
        from llmkern.inspect.cli import main as inspect

        raise SystemExit(inspect(sys.argv[2:]))
    if sys.argv[1:2] == ["report"]:
        from llmkern.evaluation.report.cli import main as report

        raise SystemExit(report(sys.argv[2:]))
    if sys.argv[1:2] == ["serve"]:
        from llmkern.models.serve import main as serve

        serve(sys.argv[2:])
        return
    if len(sys.argv) > 1:
        came = " ".join(sys.argv[1:])
        raise SystemExit(f"python -m llmkern: expected nothing, inspect, report or serve, got {came!r}")
    print("\n".join(build_lines()))
    if os.environ.get("LLMKERN_BACKEND"):
        print(f"backend        {backend._forced} for every call (LLMKERN_BACKEND)")
    print("\n".join([*preference_lines(), *operator_lines()]))
    if extension._C is not None and backend._forced is None:
        print("\n".join(cost_lines()))


if __name__ == "__main__":
    main()
