"""What the kernels are measured against, each the way its makers mean it to be called.

ONNX Runtime and OpenVINO are not here: their thread pools spin and slow whatever shares the process with them, so that
alternating with them would measure the wrong thing.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def attention_eager(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, causal: bool = False, gqa: bool = False
) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v, step by step. mask: boolean, True takes part."""
    if gqa:
        key, value = (t.repeat_interleave(query.size(1) // t.size(1), 1) for t in (key, value))
    scores = query @ key.transpose(-1, -2) * query.size(-1) ** -0.5
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, -1) @ value


def attention_sdpa(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, causal: bool = False, gqa: bool = False
) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, enable_gqa=gqa)


def rotary_eager(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """Both layouts of rotary embedding, as the published models write them."""

    def rotate(x: Tensor) -> Tensor:
        c, s, half = cos[: x.size(-2)].to(x.dtype), sin[: x.size(-2)].to(x.dtype), cos.size(-1)
        rest = x[..., 2 * half :]
        if interleaved:
            a, b = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
            return torch.cat([torch.stack([a * c - b * s, b * c + a * s], -1).flatten(-2), rest], -1)
        a, b = x[..., :half], x[..., half : 2 * half]
        return torch.cat([a * c - b * s, b * c + a * s, rest], -1)

    return rotate(q), rotate(k)


def sinusoidal_eager(x: Tensor, pe: Tensor, scale: float = 1.0) -> Tensor:
    return x * scale + pe[: x.size(0)].to(x.dtype)


def compile_missing() -> str | None:
    """Why torch.compile cannot run here; None where it can."""
    if not (shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")):
        return "torch.compile needs a C++ compiler, and there is none"
    return None


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def with_compiled(
    found: dict[str, Callable[[], Any]], function: Callable[..., Any], args: tuple[Any, ...], compile: bool,
    **options: Any,
) -> dict[str, str]:  # fmt: skip
    """Adds function(*args, **options) by torch.compile to the contestants; tells why not, where it cannot run."""
    if not compile:
        return {}
    missing = compile_missing()
    if missing:
        return {"torch.compile": missing}
    made = compiled(function)
    found["torch.compile"] = lambda: made(*args, **options)
    return {}


def quantized_engines() -> list[str]:
    """torch's engines for a dynamically quantised linear that this build and processor have."""
    return [e for e in ("x86", "onednn", "fbgemm", "qnnpack") if e in torch.backends.quantized.supported_engines]


def quantized_linear(linear: nn.Linear, engine: str) -> Callable[[Tensor], Tensor]:
    """torch.ao's dynamically quantised linear, its weight packed for the engine. Takes and gives float32."""
    before = torch.backends.quantized.engine
    try:
        torch.backends.quantized.engine = engine
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.ao announces its retirement
            module = torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear}, dtype=torch.qint8)
    finally:
        torch.backends.quantized.engine = before
    return module[0]  # type: ignore[no-any-return]
