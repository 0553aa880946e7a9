"""Benchmarks against the strongest peers, in one process, each case held to the contract before it is timed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks import peers
from benchmarks.gpu import calls
from benchmarks.gpu.contestants import OURS, Contestants, held, ours, peer, report, served_by
from benchmarks.gpu.speed_attention import attention, decode
from benchmarks.gpu.speed_loss import losses
from benchmarks.gpu.steps import Setting, Step
from llmkern import functional


def part(setting: Setting) -> Iterator[Step]:
    yield from attention(setting)
    yield from decode(setting)
    yield from int8(setting)
    yield from int8_backward(setting)
    yield from rotary(setting)
    yield from losses(setting)


# --- int8 --------------------------------------------------------------------------------------------------------


def int8(setting: Setting) -> Iterator[Step]:
    # (M, K, N)
    shapes = [(32, 64, 64)] if setting.tiny else [(1, 4096, 4096), (16, 4096, 4096), (4096, 4096, 4096)]
    if not (setting.tiny or setting.quick):
        shapes += [(64, 4096, 11008), (4096, 4096, 11008), (16384, 4096, 4096)]
    for shape in shapes:
        yield Step(f"int8 linear {','.join(map(str, shape))} bf16", lambda shape=shape: _int8(setting, shape))


def _int8(setting: Setting, shape: tuple[int, int, int]) -> dict[str, Any]:
    rows, depth, outputs = shape
    device, dtype = setting.device, torch.bfloat16
    x, dense = torch.randn(rows, depth, device=device).to(dtype), torch.randn(outputs, depth, device=device).to(dtype)
    weight, scale = calls.int8_reference.quantize_weight(dense)
    integers = torch.randint(-127, 128, (rows, depth), device=device).to(torch.int8)

    def torchao(configuration: str) -> Callable[[], Any]:
        module = importlib.import_module("torchao.quantization")
        layer = torch.nn.Linear(depth, outputs, bias=False, device=device, dtype=dtype)
        layer.weight.data.copy_(dense)
        module.quantize_(layer, getattr(module, configuration)())
        function = layer if peers.compile_missing() else torch.compile(layer, mode="max-autotune-no-cudagraphs")

        def run() -> Any:
            with torch.no_grad():
                return function(x)

        return run

    found: Contestants = {"bf16 matmul": lambda: F.linear(x, dense)}
    skipped: dict[str, str] = {}
    # The product alone, of integers that somebody else made.
    found["torch._int_mm, product alone"] = lambda: torch._int_mm(integers, weight.t())
    if not (setting.tiny or setting.quick):
        dynamic = "Int8DynamicActivationInt8WeightConfig"
        peer(found, skipped, "torchao W8A8", lambda: torchao(dynamic))
        peer(found, skipped, "torchao W8A16", lambda: torchao("Int8WeightOnlyConfig"))
    for scheme in ("outliers", "row", "16bit"):
        smaller = calls.int8_linear(setting, (min(rows, 256), depth, outputs), dtype, scheme, "none")
        for name in setting.backends:
            reason = held(smaller, name)
            if reason:
                skipped[f"{OURS} {name} {scheme}"] = reason
                continue
            found[f"{OURS} {name} {scheme}"] = served_by(
                name, lambda scheme=scheme: functional.int8_linear(x, weight, scale, inputs=scheme)
            )
    moved = float(x.nbytes + weight.nbytes + 2 * rows * outputs)
    return report(setting, found, skipped, "bf16 matmul", 2.0 * rows * depth * outputs, "int8", moved)


def int8_backward(setting: Setting) -> Iterator[Step]:
    # (M, K, N)
    shapes = [(32, 64, 64)] if setting.tiny else [(4096, 4096, 4096)]
    if not (setting.tiny or setting.quick):
        shapes += [(16, 4096, 4096), (4096, 4096, 11008)]
    for shape in shapes:
        yield Step(
            f"int8 linear backward {','.join(map(str, shape))} bf16", lambda shape=shape: _int8_backward(setting, shape)
        )


def _int8_backward(setting: Setting, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Beside products of the weight in bfloat16: kept so, in twice the memory, and made so in each call."""
    rows, depth, outputs = shape
    device, dtype = setting.device, torch.bfloat16
    grad = torch.randn(rows, outputs, device=device).to(dtype)
    weight, scale = calls.int8_reference.quantize_weight(torch.randn(outputs, depth, device=device))
    dense = (weight * scale[:, None]).to(dtype)
    found: Contestants = {
        "bf16 matmul": lambda: grad @ dense,
        "bf16 matmul, dequantised each time": lambda: grad @ (weight * scale[:, None]).to(dtype),
    }
    skipped: dict[str, str] = {}
    smaller = calls.int8_backward(setting, (min(rows, 256), depth, outputs), dtype)
    ours(found, skipped, setting, smaller, lambda: calls.input_gradient(grad, weight, scale, 0, 1))
    moved = float(grad.nbytes + weight.nbytes + 2 * rows * depth)
    return report(setting, found, skipped, "bf16 matmul", 2.0 * rows * depth * outputs, "bf16", moved)


# --- rotary ------------------------------------------------------------------------------------------------------


def rotary(setting: Setting) -> Iterator[Step]:
    shapes = [(1, 2, 16, 64)] if setting.tiny else [(4, 32, 4096, 128)]
    for shape in shapes:
        yield Step(f"rotary {','.join(map(str, shape))} bf16", lambda shape=shape: _rotary(setting, shape))


def _rotary(setting: Setting, shape: tuple[int, ...]) -> dict[str, Any]:
    call = calls.rotary(setting, shape, torch.bfloat16, False)
    q, k = call.args
    cos, sin = (t.to(setting.device) for t in calls.positional_reference.rotary_table(shape[2], shape[3], 10000.0))

    def liger() -> Callable[[], Any]:
        module = importlib.import_module("liger_kernel.ops.rope")
        wide = [torch.cat([t, t], -1).to(q.dtype)[None] for t in (cos, sin)]
        return lambda: module.LigerRopeFunction.apply(q, k, *wide)

    def compiled() -> Callable[[], Any]:
        missing = peers.compile_missing()
        if missing:
            raise RuntimeError(missing)
        function = peers.compiled(peers.rotary_eager)
        return lambda: function(q, k, cos, sin)

    found: Contestants = {"torch eager": lambda: peers.rotary_eager(q, k, cos, sin)}
    skipped: dict[str, str] = {}
    peer(found, skipped, "torch compile", compiled)
    peer(found, skipped, "Liger", liger)
    smaller = calls.rotary(setting, (1, shape[1], min(shape[2], 1024), shape[3]), torch.bfloat16, False)
    ours(found, skipped, setting, smaller, lambda: functional.rotary(q, k, cos, sin))
    return report(setting, found, skipped, "torch eager", 0.0, "bf16", 4.0 * q.nbytes)
