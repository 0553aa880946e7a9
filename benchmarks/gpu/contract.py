"""The numerical contract (llmkern.verify) of every operator on every GPU backend, at full sizes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.calls import Case, cases
from benchmarks.gpu.steps import Setting, Step
from llmkern import backend
from llmkern.verify import verify


def part(setting: Setting) -> Iterator[Step]:
    for case in cases(setting):
        for name in setting.backends:
            yield Step(f"{case.operator} {case.name} on {name}", lambda case=case, name=name: held(case, name))


def held(case: Case, name: str) -> dict[str, Any]:
    """The errors beside the allowed ones. Raises AssertionError with the table where they are larger."""
    call = case.make()
    with backend.use(name):
        report = verify(call.function, call.plain, call.args, gradients=call.gradients)
    report.raise_if_failed()
    worst = max((r.max_error / r.max_allowed for r in report.rows if r.max_allowed > 0), default=0.0)
    return {
        "backend": name,
        "share_of_allowed_error": worst,
        "line": f"kept, at {worst:.0%} of the allowed error",
        "errors": {r.name: {"max": r.max_error, "reference": r.max_reference} for r in report.rows},
    }


def run_small(device: str, name: str, operator: str) -> int:
    """Every small call of an operator once, forward and backward, for a tool that watches the process."""
    ran = 0
    for case in cases(Setting(device, True), small=True):
        if case.operator != operator:
            continue
        call = case.make()
        try:
            with backend.use(name):
                inputs = [x.requires_grad_() if call.gradients and x.is_floating_point() else x
                          for x in call.args if x is not None]  # fmt: skip
                args = iter(inputs)
                outputs = call.function(*[None if x is None else next(args) for x in call.args])
                if call.gradients:
                    for y in outputs if isinstance(outputs, tuple) else (outputs,):
                        y.float().sum().backward(retain_graph=True)
        except backend.BackendError:
            continue
        ran += 1
    print(f"{operator}: {ran} calls on {name}")
    return ran


if __name__ == "__main__":
    sys.exit(0 if run_small(*sys.argv[1:4]) else 3)
