"""Calls of int8_linear on CPU tensors, served by the Triton backend, whose launches go to what a test gives."""

from __future__ import annotations

from typing import Any

from llmkern import backend, triton
from llmkern.int8 import triton_gradient_launch, triton_launch


def serve(monkeypatch: Any, run: triton.Run, family: str = "sm_80") -> None:
    for name, plan, refused in (
        ("int8_linear", lambda *args: triton_launch.plan(run, family, *args), triton_launch._refused),
        (
            "int8_linear_backward",
            lambda *args: triton_gradient_launch.plan(run, *args),
            triton_gradient_launch._refused,
        ),
    ):
        operator = backend.Operator.all[name]
        by_device = {**operator.by_device, "cpu": [backend.Backend("triton", plan, refused)]}
        monkeypatch.setattr(operator, "by_device", by_device)
    backend.forget_plans()
