"""The loss of hidden states, with gradients, beside torch, Liger and cut-cross-entropy: time and peak memory."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import peers
from benchmarks.gpu import loss_calls
from benchmarks.gpu.contestants import Contestants, ours, peer, report
from benchmarks.gpu.steps import Setting, Step
from llmkern import functional


def losses(setting: Setting) -> Iterator[Step]:
    # (rows, width, classes)
    shapes = [(5, 24, 70)] if setting.tiny else [(8192, 4096, 128256)]
    if not (setting.tiny or setting.quick):
        shapes += [(8192, 2048, 32000), (2048, 576, 49152)]
    for shape in shapes:
        name = f"linear cross entropy with gradients {','.join(map(str, shape))} bf16"
        yield Step(name, lambda shape=shape: _linear_cross_entropy(setting, shape))


def _linear_cross_entropy(setting: Setting, shape: tuple[int, int, int]) -> dict[str, Any]:
    rows, width, count = shape
    call = loss_calls.linear_cross_entropy(setting, shape, torch.bfloat16)
    leaves = [t.requires_grad_() for t in call.args]
    hidden, weight = leaves
    targets = loss_calls.classes(setting, rows, count)

    def timed(forward: Callable[[], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(forward(), leaves)

    def eager(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), targets)

    def compiled() -> Callable[[], Any]:
        missing = peers.compile_missing()
        if missing or setting.tiny:
            raise RuntimeError(missing or "not at tiny sizes")
        function = peers.compiled(eager)
        return timed(lambda: function(hidden, weight))

    def chunked() -> Callable[[], Any]:
        options = torch.nn.LinearCrossEntropyOptions()
        return timed(lambda: F.linear_cross_entropy(hidden, weight, targets, options=options))

    def liger() -> Callable[[], Any]:
        function = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
        apply = function.LigerFusedLinearCrossEntropyFunction.apply
        return timed(lambda: apply(hidden, weight, targets)[0])

    def cut() -> Callable[[], Any]:
        function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
        return timed(lambda: function(hidden, weight, targets))

    found: Contestants = {"torch eager": timed(lambda: eager(hidden, weight))}
    skipped: dict[str, str] = {}
    for name, make in (("torch compile", compiled), ("torch chunked", chunked), ("Liger", liger), ("CCE", cut)):
        peer(found, skipped, name, make)
    smaller = loss_calls.linear_cross_entropy(setting, (min(rows, 300), min(width, 512), count), torch.bfloat16)
    run = timed(lambda: functional.linear_cross_entropy(hidden, weight, targets))
    ours(found, skipped, setting, smaller, run)
    peaks = {name: peak(setting, function) for name, function in found.items()}
    moved = float(2 * (hidden.nbytes + weight.nbytes))
    return {
        **report(setting, found, skipped, "torch eager", 6.0 * rows * width * count, "bf16", moved),
        "peak_bytes": peaks, "gradient_bytes": hidden.nbytes + weight.nbytes,
    }  # fmt: skip


def peak(setting: Setting, function: Callable[[], Any]) -> int | None:
    """The most memory that a call has beside what is there before it, in bytes; None where it cannot be read or the
    call fails, which the times tell."""
    if setting.device == "cpu":
        return None
    try:
        function()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
    except Exception:
        return None
    return torch.cuda.max_memory_allocated() - before
