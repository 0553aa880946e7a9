"""The attention on a cache served by Triton's kernels, run by whatever runs a launch."""

from __future__ import annotations

from typing import Any

from llmkern import backend, triton
from llmkern.attention import triton_decode_launch
from tests.attention.decode_cases import ONE_PIECE


def serve(monkeypatch: Any, run: triton.Run, processors: int = ONE_PIECE, family: str = "sm_80") -> None:
    stands = backend.Backend(
        "triton", lambda *args: triton_decode_launch.decode(run, family, processors, *args), lambda *args: None
    )  # fmt: skip
    operator = backend.Operator.all["attention_kvcache"]
    monkeypatch.setattr(operator, "by_device", {**operator.by_device, "cpu": [stands]})
    backend.forget_plans()
