"""The operators of this family served by Triton's kernels, run by whatever runs a launch."""

from __future__ import annotations

from typing import Any

from llmkern import backend, triton
from llmkern.attention import triton_int8_launch, triton_launch, triton_varlen_launch, triton_weights_launch
from llmkern.attention.triton_configurations import Configuration

PLANS = {
    "attention": triton_launch.forward, "attention_backward": triton_launch.backward,
    "attention_weights": triton_weights_launch.weights, "attention_column_sums": triton_weights_launch.column_sums,
    "attention_weights_backward": triton_weights_launch.backward,
    "attention_varlen": triton_varlen_launch.forward, "attention_varlen_backward": triton_varlen_launch.backward,
    "attention_int8": triton_int8_launch.attention,
}  # fmt: skip


def serve(monkeypatch: Any, run: triton.Run, family: str = "sm_80", tile: Configuration | None = None) -> None:
    """Calls of the operators on CPU tensors go through Triton's launchers to `run`. tile: instead of the table's."""
    if tile is not None:
        for module in (triton_launch, triton_weights_launch, triton_int8_launch):
            monkeypatch.setattr(module, "configuration", lambda *args, **own: tile)
    for name, plan in PLANS.items():
        stands = backend.Backend("triton", lambda *args, plan=plan: plan(run, family, *args), lambda *args: None)
        operator = backend.Operator.all[name]
        monkeypatch.setattr(operator, "by_device", {**operator.by_device, "cpu": [stands]})
    backend.forget_plans()
