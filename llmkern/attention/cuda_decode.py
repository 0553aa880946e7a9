"""The attention on a cache for CUDA as a backend: one kernel writes what is new, another attends to all."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from llmkern import cuda
from llmkern.attention import cache
from llmkern.attention.compiled.kvcache import kvcache_launcher
from llmkern.attention.compiled.params import plain
from llmkern.backend import Backend

ROWS = 16  # queries times heads of a group that share a pass over the keys
_MOST_WIDTH = 256
_MOST_KEYS = 2**30
_BLOCKS_OF_A_PROCESSOR = 4  # enough that while some wait for the memory, others compute
_FEWEST_KEYS = 256  # of a piece: four tiles for each warp
_MOST_PIECES = 128  # as kMostPieces of csrc/attention/cuda_decode.cu


def _blocks(query: Tensor, k_cache: Tensor) -> int:
    """Of a launch whose keys are in one piece."""
    (batch, queries, heads, _), kv_heads = query.shape, k_cache.shape[2]
    return batch * kv_heads * -(-queries * heads // max(kv_heads, 1) // ROWS)


@lru_cache
def processors(device: torch.device) -> int:
    """How many streaming multiprocessors the device has."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def pieces(blocks: int, keys: int, count: int) -> int:
    """Into how many pieces the keys are cut, where there are `blocks` of work besides, for `count` processors."""
    wanted = -(-_BLOCKS_OF_A_PROCESSOR * count // max(blocks, 1))
    return max(1, min(wanted, -(-keys // _FEWEST_KEYS), _MOST_PIECES))


def _kvcache(query: Tensor, k_cache: Tensor, v_cache: Tensor, *args: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    device, (batch, queries, heads, _) = query.device, query.shape
    splits = pieces(_blocks(query, k_cache), cache.capacity(k_cache, args[5]), processors(device))
    floats = batch * heads * queries * splits * (v_cache.shape[3] + 2) + 7 if splits > 1 else 0
    append, attend = cuda.kernel("cache_append_cuda"), cuda.kernel("attention_decode_cuda")

    def append_kernel(plan: Any, *tensors: Tensor | None) -> None:
        append(plan, *cuda.stream(device), *tensors)

    def attend_kernel(plan: Any, *tensors: Tensor | None) -> None:
        workspace = torch.empty(floats, dtype=torch.float32, device=device) if floats else None
        attend(plan, *cuda.stream(device), splits, workspace, *tensors)

    return kvcache_launcher(append_kernel, attend_kernel, query, k_cache, v_cache, *args)


def _unsupported_kvcache(query: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any) -> str | None:
    reason = cuda.unsupported(query)
    return reason if reason is not None else unsupported_call(query, k_cache, v_cache, rest[5])


def unsupported_call(query: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor | None) -> str | None:
    """Why the kernels cannot serve a call, whatever the machine."""
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"its kernels compute bfloat16 and float16, not {str(query.dtype).removeprefix('torch.')}"
    width = max(query.shape[3], v_cache.shape[3])
    if width > _MOST_WIDTH:
        return f"its kernels take heads of width 1 to {_MOST_WIDTH}, not {width}"
    if cache.capacity(k_cache, block_table) >= _MOST_KEYS:
        return f"its kernels take caches of fewer than 2^30 tokens, not of {cache.capacity(k_cache, block_table)}"
    # So many are in one piece each. Those of the append take several rows where they are too many.
    if _blocks(query, k_cache) > cuda.MOST_BLOCKS:
        return f"its kernels take up to 2^31 - 1 blocks of {ROWS} rows, not {_blocks(query, k_cache)}"
    if any(plain(t) is not t for t in (k_cache, v_cache)):
        return "its kernels write into caches whose last dimension is contiguous alone"
    return None


CUDA_KVCACHE = Backend("cuda", _kvcache, _unsupported_kvcache)
