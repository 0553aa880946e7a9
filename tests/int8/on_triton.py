"""Calls of int8_linear on CPU tensors, served by the Triton backend, whose launches go to what a test gives."""

from __future__ import annotations

from typing import Any

from llmkern import backend, triton
from llmkern.int8 import triton_launch


def serve(monkeypatch: Any, run: triton.Run, family: str = "sm_80") -> None:
    stands = backend.Backend("triton", lambda *args: triton_launch.plan(run, family, *args), triton_launch._refused)
    operator = backend.Operator.all["int8_linear"]
    monkeypatch.setattr(operator, "by_device", {**operator.by_device, "cpu": [stands]})
    backend.forget_plans()
