"""Triton's attention on a cache as a backend: one kernel writes what is new, others attend to all."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmkern import overlap, triton
from llmkern.attention import cache
from llmkern.attention.compiled.params import as_sink, plain, through_copies
from llmkern.attention.cuda_decode import ROWS, pieces, processors
from llmkern.attention.triton_call import LOG2E, MOST_WINDOW, WIDEST, padded
from llmkern.attention.triton_configurations import decode_configuration
from llmkern.attention.triton_launch import TARGETS, family_of, unsupported
from llmkern.backend import Backend

if TYPE_CHECKING:
    from llmkern.inspect.triton_source import Compilation

#: Tokens are numbered in 32 bits, with room for the sum of a place, a window and the queries.
_MOST_TOKENS = 2**28
_DECODE, _CACHE = (f"llmkern.attention.triton_{name}" for name in ("decode", "cache"))
_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


def _steps(t: Tensor | None) -> tuple[int, ...]:
    """Of a sequence or page, a token and a head."""
    return (0, 0, 0) if t is None else tuple(t.stride()[:3])


def _or(t: Tensor | None, other: Tensor) -> Tensor:
    return other if t is None else t


def decode(
    run: triton.Run, family: str, count: int, query: Tensor, k_cache: Tensor, v_cache: Tensor, key: Tensor | None,
    value: Tensor | None, cos: Tensor | None, sin: Tensor | None, lengths: Tensor | None, table: Tensor | None,
    k_scale: Tensor | None, v_scale: Tensor | None, slopes: Tensor | None, sink: Tensor | None, left: int, right: int,
    softcap: float, scale: float, interleaved: bool,
) -> Callable[..., tuple[Tensor, Tensor]]:  # fmt: skip
    """The launcher of all calls with these metadata, by `run` with the configurations of `family`, on a device of
    `count` processors."""
    if any(t is not None and plain(t) is not t for t in (query, key, value, cos, sin, table)):
        # The caches, which are written to, are plain: see `limits`.
        return through_copies(lambda *args: decode(run, family, count, *args), 9)
    (batch, queries, heads, width), kv_heads, value_width = query.shape, k_cache.shape[2], v_cache.shape[3]
    group, capacity = heads // max(kv_heads, 1), cache.capacity(k_cache, table)
    added, appends = 0 if key is None else key.shape[1], key is not None and lengths is not None
    half = cos.shape[1] if cos is not None and appends else 0
    natural, ordered = query.dtype == torch.float32, left >= 0 or right >= 0
    bends = softcap > 0.0 or slopes is not None or scale <= 0.0 or natural
    all_rows, blocks = batch * queries * heads, batch * kv_heads * -(-queries * group // ROWS)
    splits = pieces(blocks, capacity, count)
    block_d, block_dv = padded(width), padded(value_width)
    tile = decode_configuration(family, query.element_size(), max(block_d, block_dv))
    widths = {"D": width, "DV": value_width, "BLOCK_D": block_d, "BLOCK_DV": block_dv}
    stored = {"PAGED": table is not None, "INT8": k_scale is not None}
    page_size, pages = max(k_cache.shape[1], 1), k_cache.shape[0]
    table_b, lengths_b = 0 if table is None else table.stride(0), 0 if lengths is None else lengths.stride(0)
    if appends:
        cache.check_within(k_cache, v_cache)
    reach = max(overlap.extent(k_cache), overlap.extent(v_cache))
    constants = {
        **widths, **stored, "BLOCK_M": ROWS, "BLOCK_N": tile.keys, "LEFT": left >= 0, "RIGHT": right >= 0,
        "LENGTHS": lengths is not None, "SOFTCAP": softcap > 0.0, "ALIBI": slopes is not None,
        "SINK": sink is not None, "BEND": bends, "NATURAL": natural,
        "ORDERED": ordered and queries > 1, "SPLIT": splits > 1,
    }  # fmt: skip
    windows = tuple(min(max(x, 0), MOST_WINDOW) for x in (left, right))
    numbers = (
        heads, group, queries, capacity, added, splits, all_rows, *windows, scale,
        LOG2E * (1.0 if bends else scale), softcap, page_size, pages,
    )  # fmt: skip
    of_slopes = (0, 0) if slopes is None else (slopes.stride(0) if slopes.dim() == 2 else 0, slopes.stride(-1))
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    of_cache = max(1, min(triton.power_of_two(kv_heads), 4096 // max(block_d, block_dv), 16))
    tokens = batch * added * -(-kv_heads // of_cache)
    turned = batch * queries * -(-heads // of_cache) if half else 0

    def append(query: Tensor, rotated: Tensor, *tensors: Tensor | None) -> None:
        k_cache, v_cache, key, value, cos, sin, lengths, table, k_scale, v_scale = tensors
        assert key is not None and value is not None
        arguments = (
            query, key, value, rotated, k_cache, v_cache,
            *(_or(t, query) for t in (k_scale, v_scale, lengths, table, cos, sin)), heads, kv_heads, queries, added,
            capacity, 0 if cos is None else cos.shape[0], page_size, pages, tokens, *_steps(query), *_steps(key),
            *_steps(value), *_steps(k_cache), *_steps(v_cache), *_steps(k_scale), *_steps(v_scale),
            0 if cos is None else cos.stride(0), 0 if sin is None else sin.stride(0), table_b, lengths_b,
        )  # fmt: skip
        made = {**widths, **stored, "HEADS": of_cache, "HALF": half, "INTERLEAVED": interleaved, "ORDERED": ordered}
        changed = ("k_cache", "v_cache", *(("k_scale", "v_scale") if k_scale is not None else ()))
        run(triton.Launch(
            _CACHE, "cache_append_kernel", (tokens + turned,), arguments, made, {**_OPTIONS, "enable_fp_fusion": False},
            ("rotated",) if half else (), changed,
        ))  # fmt: skip

    def launch(
        query: Tensor, k_cache: Tensor, v_cache: Tensor, key: Tensor | None, value: Tensor | None, cos: Tensor | None,
        sin: Tensor | None, lengths: Tensor | None, table: Tensor | None, k_scale: Tensor | None,
        v_scale: Tensor | None, slopes: Tensor | None, sink: Tensor | None, *rest: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        device = query.device
        if appends and tokens + turned:
            if k_cache.device.type != "meta" and abs(k_cache.data_ptr() - v_cache.data_ptr()) < reach:
                cache.check_apart(k_cache, v_cache)
            rotated = torch.empty(query.shape, dtype=query.dtype, device=device) if half else query
            append(query, rotated, k_cache, v_cache, key, value, cos, sin, lengths, table, k_scale, v_scale)
            query = rotated
        output = torch.empty((batch, queries, heads, value_width), dtype=query.dtype, device=device)
        logsumexp = torch.empty((batch, heads, queries), dtype=torch.float64, device=device)
        if not all_rows:
            return output, logsumexp
        floats = all_rows * splits * (value_width + 2) if splits > 1 else 0
        workspace = torch.empty(floats, dtype=torch.float32, device=device) if floats else query
        sink = as_sink(sink)
        arguments = (
            query, k_cache, v_cache, output, logsumexp, workspace,
            *(_or(t, query) for t in (k_scale, v_scale, lengths, table, slopes, sink)), *numbers, *_steps(query),
            *_steps(k_cache), *_steps(v_cache), *_steps(k_scale), *_steps(v_scale), table_b, lengths_b, *of_slopes,
        )  # fmt: skip
        written = ("workspace",) if splits > 1 else ("output", "logsumexp")
        run(triton.Launch(
            _DECODE, "attention_decode_kernel", (blocks * splits,), arguments, constants, options, written
        ))  # fmt: skip
        if splits > 1:
            made = {
                "DV": value_width, "BLOCK_DV": block_dv, "SPLITS": max(triton.power_of_two(splits), 8),
                "SINK": sink is not None, "NATURAL": natural,
            }  # fmt: skip
            run(triton.Launch(
                _DECODE, "attention_combine_kernel", (all_rows,),
                (workspace, output, logsumexp, _or(sink, query), heads, queries, splits, all_rows), made,
                {**_OPTIONS, "num_warps": 1}, ("output", "logsumexp"),
            ))  # fmt: skip
        return output, logsumexp

    return launch


def limits(query: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor | None) -> str | None:
    """Why the kernels cannot serve a call, whatever the machine."""
    width = max(query.shape[3], v_cache.shape[3])
    if width > WIDEST or not query.shape[3]:
        return f"its kernels take heads of width 1 to {WIDEST}, not {width if query.shape[3] else 0}"
    tokens = max(cache.capacity(k_cache, table), query.shape[1])
    if tokens > _MOST_TOKENS:
        return f"its kernels take up to 2^28 tokens of a sequence, not {tokens}"
    if query.shape[0] * query.shape[1] * query.shape[2] >= 2**24:
        return f"its kernels take fewer than 2^24 rows of queries, not {tuple(query.shape[:3])}"
    if any(plain(t) is not t for t in (k_cache, v_cache)):
        return "its kernels write into caches whose last dimension is contiguous alone"
    if table is not None and not k_cache.shape[0] and tokens:
        return "its kernels read from pools that have pages alone"
    return None


TRITON_KVCACHE = Backend(
    "triton",
    lambda query, *args: decode(triton.run, family_of(query.device), processors(query.device), query, *args),
    lambda query, k_cache, v_cache, *rest: unsupported(query) or limits(query, k_cache, v_cache, rest[5]),
)


def examples(family: str, dtype: torch.dtype, width: int, int8: bool, paged: bool) -> Iterator[triton.Launch]:
    """The launches of a call with one new token, rotated and causal, without memory."""
    made: list[triton.Launch] = []
    q, k = (torch.empty(1, 1, h, width, dtype=dtype, device="meta") for h in (8, 2))
    shape = (64, 16, 2) if paged else (1, 1024, 2)
    kv = torch.empty(*shape, width, dtype=torch.int8 if int8 else dtype, device="meta")
    angles = torch.empty(1024, width // 2, device="meta")
    table = torch.empty(1, 64, dtype=torch.int32, device="meta") if paged else None
    lengths, scales = torch.empty(1, dtype=torch.int32, device="meta"), torch.empty(shape, device="meta")
    of_cache = (scales, scales) if int8 else (None, None)
    args = (
        q, kv, kv, k, k, angles, angles, lengths, table, *of_cache, None, None, -1, 0, 0.0, width**-0.5, False,
    )  # fmt: skip
    decode(made.append, family, 132, *args)(*args)
    yield from made


def compilations() -> Iterator[Compilation]:
    """What `python -m llmkern inspect` compiles: a new token of heads of 64, 128 and 256, static and paged caches, and
    float32."""
    from llmkern.inspect.triton_source import Compilation

    bf16, fp32 = torch.bfloat16, torch.float32
    some = (
        (64, False, False, bf16), (128, False, False, bf16), (128, True, True, bf16), (256, False, False, bf16),
        (128, False, False, fp32), (256, False, False, fp32),
    )  # fmt: skip
    for (name, targets), (width, int8, paged, dtype) in itertools.product(TARGETS.items(), some):
        for launch in examples(name, dtype, width, int8, paged):
            if launch.kernel == "attention_combine_kernel" and (int8 or dtype == fp32):
                continue  # as of the other cache
            stored = "int8" if int8 else "bf16" if dtype == bf16 else "fp32"
            config = f"{stored}, {'paged' if paged else 'static'}, D={width}"
            if launch.kernel == "attention_combine_kernel":
                config = f"bf16, D={width}"
            # The only kernels of this family that fit the registers of gfx1100; with float32 they spill there.
            fits = name == "gfx942" and dtype != fp32
            yield Compilation.of(launch, config, (*targets, "gfx1100") if fits else targets)
