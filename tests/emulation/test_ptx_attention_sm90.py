"""The attention forward for Hopper: its PTX, executed, against the plain reference; and what ptxas makes of it."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

from llmkern.verify import verify
from tests.attention.cases import attend, rule, tensors
from tests.emulation import compilers
from tests.emulation.ptx.launch import Buffer, Launch, TensorMap, empty, find, run

SOURCE = compilers.ROOT / "csrc/attention/cuda_sm90.cu"
MANGLED = {torch.bfloat16: "NS_4Bf16E", torch.float16: "NS_4Fp16E"}
OPEN = 1 << 30  #: a window's side that is open
TILE = 128  #: rows of a block, and keys of a tile
THREADS = 384
needs_nvcc = pytest.mark.skipif(compilers.NVCC is None, reason=compilers.NO_NVCC)


def raw(x: torch.Tensor) -> np.ndarray:
    """The bits of a tensor for numpy, with its strides."""
    return x.view(torch.int16).numpy().view(np.uint16)


def kernel(changes: tuple[tuple[str, str], ...] = (), reports: list | None = None, **options: object):
    """A function of (query, key, value, rules of tests/attention/cases.py) that runs the PTX."""

    def function(
        query, key, value, key_lengths=None, causal=False, bottom_right=False, window=(-1, -1), uniform=False,
        scale=None,
    ):  # fmt: skip
        batch, heads, queries, width = query.shape
        kv_heads, keys = key.shape[1:3]
        launch = Launch()
        output = empty(query.shape, np.uint16, "output")
        sums = empty((batch, heads, queries), np.float64, "logsumexp")
        left, right = (OPEN if side < 0 else side for side in (window[0], 0 if causal else window[1]))
        lengths = 0 if key_lengths is None else launch.address(key_lengths.numpy(), "lengths")
        blocks = -(-queries // TILE)
        work = struct.pack(
            "<QQqq7if???5x", lengths, launch.address(sums), 1, 0, heads, heads // kv_heads, queries, keys, left, right,
            blocks, width**-0.5 if scale is None else scale,
            key_lengths is not None and key_lengths.dtype == torch.int64, bottom_right, uniform,
        )  # fmt: skip
        maps = [
            TensorMap(Buffer(raw(x), name, read_only=True), (1, 1, rows, 64), 128) if x.numel() else bytes(128)
            for x, name, rows in ((query, "query", 64), (key, "key", TILE), (value, "value", TILE))
        ]
        shared = 1024 * (1 + 5 * width // 2)
        ptx = compilers.nvcc(SOURCE, "90a", changes)
        name = find(ptx, f"attention_sm90_kernelI{MANGLED[query.dtype]}Li{width}E")
        arguments = [*maps, TensorMap(output, (1, 1, 64, 64), 128), work]
        report = run(
            ptx, name, batch * heads * blocks, THREADS, arguments, shared_bytes=shared, launch=launch, **options
        )
        if reports is None:
            report.raise_if_faulty()
        else:
            reports.append(report)
        made = torch.from_numpy(output.data.copy()).view(query.dtype)
        return made, torch.from_numpy(sums.data.copy()).float()

    return function
