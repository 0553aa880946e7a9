"""Attention, its gradients and decoding beside SDPA, FlashAttention, FlashInfer and flex attention."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu import calls
from benchmarks.gpu.contestants import Contestants, ours, peer, report
from benchmarks.gpu.steps import Setting, Step
from llmkern import functional

# --- attention ---------------------------------------------------------------------------------------------------


def attention(setting: Setting) -> Iterator[Step]:
    # (B, H, Hkv, S, D)
    shapes = [(1, 2, 2, 64, 64)] if setting.tiny else [(4, 16, 16, 4096, 128)]
    if not (setting.tiny or setting.quick):
        shapes += [(16, 16, 16, 1024, 128), (4, 32, 32, 4096, 64), (2, 32, 8, 4096, 128)]
    for shape in shapes:
        for causal in (False, True):
            for backward in (False, True):
                words = f"{','.join(map(str, shape))} bf16{' causal' if causal else ''}"
                yield Step(
                    f"attention {'backward ' if backward else ''}{words}",
                    lambda shape=shape, causal=causal, backward=backward: _attention(setting, shape, causal, backward),
                )


def _attention(setting: Setting, shape: tuple[int, ...], causal: bool, backward: bool) -> dict[str, Any]:
    b, h, hkv, s, d = shape
    device, dtype = setting.device, torch.bfloat16
    q, k, v = (torch.randn(b, n, s, d, device=device).to(dtype).requires_grad_(backward) for n in (h, hkv, hkv))
    grad, gqa = torch.randn(b, h, s, d, device=device).to(dtype), h != hkv

    def timed(forward: Callable[[], Tensor]) -> Callable[[], Any]:
        """Forward alone, or the backward of a result that is kept."""
        if not backward:
            return forward
        kept: list[Tensor] = []

        def run() -> Any:
            if not kept:
                kept.append(forward())
            out = kept[0]
            gradient = grad if out.shape == grad.shape else grad.transpose(1, 2)
            return torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True)

        return run

    def sdpa(kernel: Any) -> Callable[[], Any]:
        from torch.nn.attention import sdpa_kernel

        def forward() -> Tensor:
            with sdpa_kernel(kernel):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)

        return timed(forward)

    def flash_attn() -> Callable[[], Any]:
        module = importlib.import_module("flash_attn")
        return timed(lambda: module.flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), causal=causal))

    def flex() -> Callable[[], Any]:
        module = importlib.import_module("torch.nn.attention.flex_attention")
        block_mask = None
        if causal:
            block_mask = module.create_block_mask(lambda b, h, i, j: i >= j, None, None, s, s, device=device)
        function = torch.compile(module.flex_attention)
        return timed(lambda: function(q, k, v, block_mask=block_mask, enable_gqa=gqa))

    found: Contestants = {}
    skipped: dict[str, str] = {}
    from torch.nn.attention import SDPBackend

    names = {"flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "cudnn": "CUDNN_ATTENTION", "math": "MATH"}
    for name, of_torch in names.items():
        peer(found, skipped, f"sdpa {name}", lambda of_torch=of_torch: sdpa(getattr(SDPBackend, of_torch)))
    peer(found, skipped, "flash_attn", flash_attn)
    if not (setting.tiny and backward):  # there is no such backward on a CPU
        peer(found, skipped, "flex attention", flex)
    smaller = calls.attention(
        setting, (1, h, hkv, min(s, 1024), min(s, 1024), d), dtype, "causal" if causal else "all", backward
    )

    def run() -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)

    ours(found, skipped, setting, smaller, timed(run))
    flops = 4.0 * b * h * s * s * d * (0.5 if causal else 1.0) * (2.5 if backward else 1.0)
    moved = sum(t.nbytes for t in (q, k, v, q)) * (2.0 if backward else 1.0)
    return report(setting, found, skipped, "sdpa flash", flops, "bf16", moved)


# --- decode ------------------------------------------------------------------------------------------------------


def decode(setting: Setting) -> Iterator[Step]:
    # (B, H, Hkv, S, D)
    shapes = [(2, 4, 2, 64, 64)] if setting.tiny else [(1, 32, 8, 8192, 128), (32, 32, 8, 4096, 128)]
    if not (setting.tiny or setting.quick):
        shapes += [(1, 32, 8, 65536, 128), (16, 32, 32, 2048, 128)]
    for shape in shapes:
        yield Step(f"decode {','.join(map(str, shape))} bf16", lambda shape=shape: _decode(setting, shape))


def _decode(setting: Setting, shape: tuple[int, ...]) -> dict[str, Any]:
    b, h, hkv, s, d = shape
    device, dtype = setting.device, torch.bfloat16
    q = torch.randn(b, 1, h, d, device=device).to(dtype)
    caches = [torch.randn(b, s, hkv, d, device=device).to(dtype) for _ in range(2)]
    heads_first = [t.transpose(1, 2) for t in (q, *caches)]
    lengths = torch.full((b,), s, dtype=torch.int32, device=device)

    def flashinfer() -> Callable[[], Any]:
        module = importlib.import_module("flashinfer")
        if b == 1:
            return lambda: module.single_decode_with_kv_cache(q[0, 0], caches[0][0], caches[1][0], kv_layout="NHD")
        page = 16
        wrapper = module.BatchDecodeWithPagedKVCacheWrapper(
            torch.empty(1 << 27, dtype=torch.uint8, device=device), "NHD", use_tensor_cores=h // hkv >= 4
        )
        pages = torch.arange(b * s // page, dtype=torch.int32, device=device)
        starts = torch.arange(0, b * s // page + 1, s // page, dtype=torch.int32, device=device)
        last = torch.full((b,), page, dtype=torch.int32, device=device)
        wrapper.plan(starts, pages, last, h, hkv, d, page, q_data_type=dtype, kv_data_type=dtype)
        pools = tuple(c.view(b * s // page, page, hkv, d) for c in caches)
        return lambda: wrapper.run(q[:, 0], pools)

    def flash_attn() -> Callable[[], Any]:
        module = importlib.import_module("flash_attn")
        return lambda: module.flash_attn_with_kvcache(q, *caches, cache_seqlens=lengths)

    found: Contestants = {"torch sdpa": lambda: F.scaled_dot_product_attention(*heads_first, enable_gqa=h != hkv)}
    skipped: dict[str, str] = {}
    if h != hkv:  # queries of a key head as the rows of one matrix
        rows = q.view(b, hkv, h // hkv, d)
        found["torch sdpa, heads as rows"] = lambda: F.scaled_dot_product_attention(rows, *heads_first[1:])
    peer(found, skipped, "flash_attn", flash_attn)
    peer(found, skipped, "flashinfer", flashinfer)
    smaller = calls.decode(setting, (min(b, 2), h, hkv, min(s, 1024), d, 1), dtype, "static")
    ours(found, skipped, setting, smaller,
         lambda: functional.attention_with_kvcache(q, *caches, cache_seqlens=lengths))  # fmt: skip
    moved = float(sum(c.nbytes for c in caches))
    return report(setting, found, skipped, "torch sdpa", 4.0 * b * h * s * d, "bf16", moved)
