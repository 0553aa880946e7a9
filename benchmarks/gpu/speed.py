"""Benchmarks against the strongest peers, in one process, each case held to the contract before it is timed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import peers
from benchmarks.gpu import calls, timing
from benchmarks.gpu.device_rates import floor
from benchmarks.gpu.steps import Setting, Step
from benchmarks.harness import Result, seconds
from llmkern import backend, functional
from llmkern.verify import verify

Contestants = dict[str, Callable[[], Any]]
OURS = "llmkern"


def part(setting: Setting) -> Iterator[Step]:
    yield from attention(setting)
    yield from decode(setting)
    yield from int8(setting)
    yield from rotary(setting)


def _on(name: str, function: Callable[[], Any]) -> Callable[[], Any]:
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
            found[f"{OURS} {name}"] = _on(name, run)
        else:
            skipped[f"{OURS} {name}"] = reason


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
            found[f"{OURS} {name} {scheme}"] = _on(
                name, lambda scheme=scheme: functional.int8_linear(x, weight, scale, inputs=scheme)
            )
    moved = float(x.nbytes + weight.nbytes + 2 * rows * outputs)
    return report(setting, found, skipped, "bf16 matmul", 2.0 * rows * depth * outputs, "int8", moved)


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
