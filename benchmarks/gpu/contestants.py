"""Contestants of a benchmark: ours by backend, peers whose library may be missing, and what is reported of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.gpu import calls, timing
from benchmarks.gpu.device_rates import floor
from benchmarks.gpu.steps import Setting
from llmkern import backend
from llmkern.evaluation.timing import Result, seconds
from llmkern.verify import verify

Contestants = dict[str, Callable[[], Any]]
OURS = "llmkern"


def served_by(name: str, function: Callable[[], Any]) -> Callable[[], Any]:
    """function served by that backend alone, from then on: `use` would forget plans at its end too."""

    def run() -> Any:
        backend.force(name)
        return function()

    return run


def peer(found: Contestants, skipped: dict[str, str], name: str, make: Callable[[], Callable[[], Any]]) -> None:
    """Adds a contestant whose library may be missing, or refuse to be set up."""
    try:
        found[name] = make()
    except Exception as error:
        skipped[name] = f"{type(error).__name__}: {error}".split("\n", 1)[0]


def report(
    setting: Setting, found: Contestants, skipped: Mapping[str, str], baseline: str, flops: float, dtype: str,
    bytes: float,
) -> dict[str, Any]:  # fmt: skip
    least = floor(setting.device, flops, dtype, bytes)
    try:
        result = timing.measure(found, setting.device, baseline, 3 if setting.quick or setting.tiny else 9, least)
    finally:
        backend.force(None)
    result.failed.update(skipped)
    return {"status": "measured", "line": line(result), "flops": flops, "bytes": bytes, **result.to_json()}


def line(result: Result) -> str:
    """Each contestant's time; of ours also the speed-up over the best of the others, and the share of the peak."""
    others = [n for n in result.names if not n.startswith(OURS)]
    best = min(others, key=lambda n: result.time(n).median, default=None)
    told = []
    for name in result.names:
        text = f"{name} {seconds(result.time(name).median)}"
        if name.startswith(OURS):
            share = result.share(name)
            over = f"{result.ratio(name, best).median:.2f} times {best}, " if best else ""
            text += f" ({over}{share.median:.0%} of the peak)" if share else ""
        told.append(text)
    return "; ".join(told)


def held(call: calls.Call, name: str) -> str | None:
    """Why a backend is not timed; None where it keeps the contract."""
    try:
        with backend.use(name):
            found = verify(call.function, call.plain, call.args, gradients=call.gradients)
    except backend.BackendError as reason:
        return str(reason)
    return None if found else f"wrong, so not timed:\n{found}"


def ours(
    found: Contestants, skipped: dict[str, str], setting: Setting, call: calls.Call, run: Callable[[], Any]
) -> None:
    """Our backends that serve the call; what holds it to the contract is a smaller `call` of the same kind."""
    for name in setting.backends:
        reason = held(call, name)
        if reason is None:
            found[f"{OURS} {name}"] = served_by(name, run)
        else:
            skipped[f"{OURS} {name}"] = reason
