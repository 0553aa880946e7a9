"""The attention forward for Hopper: its PTX, executed, against the plain reference; and what ptxas makes of it."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

from llmkern.attention.mask import Mask
from llmkern.attention.reference import dense
from llmkern.verify import verify
from tests.attention.cases import rule, tensors
from tests.emulation import compilers
from tests.emulation.hopper import roles_keep_registers
from tests.emulation.ptx.launch import Buffer, Launch, TensorMap, empty, find, run
from tests.emulation.ptx.machine import SCHEDULES

SOURCE = compilers.ROOT / "csrc/attention/cuda_sm90.cu"
MANGLED = {torch.bfloat16: "NS_4Bf16E", torch.float16: "NS_4Fp16E"}
OPEN = 1 << 30  #: a window's side that is open
TILE = 128  #: rows of a block, and keys of a tile
THREADS = 384
needs_nvcc = pytest.mark.skipif(compilers.NVCC is None, reason=compilers.NO_NVCC)


def tensor_map(launch: Launch, x: torch.Tensor, name: str, rows: int) -> TensorMap | bytes:
    """A map of a tensor that lies in its storage as it does in torch; without elements none."""
    if not x.numel():
        return bytes(128)
    bits = x.view(torch.int16).numpy().view(np.uint16)
    storage = torch.empty(0, dtype=torch.int16).set_(x.untyped_storage()).numpy().view(np.uint16)
    where = launch.address(Buffer(storage, name, read_only=True)) + 2 * x.storage_offset()
    return TensorMap(bits, (1, 1, rows, 64), 128, where)


def kernel(changes: tuple[tuple[str, str], ...] = (), reports: list | None = None, more: int = 0, **options: object):
    """A function of (query, key, value, rules of tests/attention/cases.py) that runs the PTX. more: keys of each
    sequence that the lengths in memory leave out, as where they were just appended."""

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
        lengths = 0 if key_lengths is None else launch.address((key_lengths - more).numpy(), "lengths")
        blocks = -(-queries // TILE)
        work = struct.pack(
            "<QQqq7if???5x", lengths, launch.address(sums), 1, more, heads, heads // kv_heads, queries, keys, left,
            right, blocks, width**-0.5 if scale is None else scale,
            key_lengths is not None and key_lengths.dtype == torch.int64, bottom_right, uniform,
        )  # fmt: skip
        maps = [
            tensor_map(launch, x, name, rows)
            for x, name, rows in ((query, "query", 64), (key, "key", TILE), (value, "value", TILE))
        ]
        shared = 1024 * (1 + 5 * width // 4)  # queries, two stages of keys and values; barriers
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


def plain(
    query, key, value, key_lengths=None, causal=False, bottom_right=False, window=(-1, -1), uniform=False, scale=None
):  # fmt: skip
    right = 0 if causal else window[1]
    mask = Mask(key_lengths=key_lengths, window_left=window[0], window_right=right, bottom_right=bottom_right)
    scale = query.size(3) ** -0.5 if scale is None else scale
    output, sums = dense.attention(query, key, value, *mask.arguments(), scale, uniform)
    return output, sums.float()


#: (B, H, Hkv, Sq, Sk, D): rows and keys around the tiles of 128, one, primes, and what fits exactly.
SHAPES = {
    "one of everything": (1, 1, 1, 1, 1, 64),
    "one query": (2, 2, 1, 1, 150, 128),
    "primes": (2, 2, 1, 67, 131, 64),
    "around the tiles": (1, 1, 1, 129, 257, 64),
    "whole tiles": (1, 1, 1, 128, 128, 128),
    "fewer keys than queries": (1, 2, 1, 133, 83, 128),
}
RULES = [
    "all", "causal", "bottom right", "lengths", "lengths, bottom right", "window", "window, bottom right",
    "window to the right",
]  # fmt: skip


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return tensors((*shape, shape[-1]), dtype)


#: Every rule where there are tails in rows and keys, some where there is little to mask.
CASES = [
    (s, r) for s in SHAPES for r in (RULES[1:6:2] if s in ("one of everything", "one query", "whole tiles") else RULES)
]


@needs_nvcc
@pytest.mark.parametrize(("shape", "name"), CASES)
def test_contract(shape, name):
    index = RULES.index(name) + list(SHAPES).index(shape)
    dtype = (torch.bfloat16, torch.float16)[index % 2]
    rules = rule(name, (*SHAPES[shape], 0)) | {"uniform": index % 4 >= 2}
    verify(kernel(), plain, inputs(SHAPES[shape], dtype), rules, gradients=False).raise_if_failed()


@needs_nvcc
@pytest.mark.parametrize("dtype", MANGLED)
@pytest.mark.parametrize("width", [64, 128])
def test_many_tiles(width, dtype):
    """Stages are used several times; keys lie in five tiles, of which windows see three."""
    shape = (1, 1, 1, 70, 600, width)
    for rules in ({}, {"window": (200, 100), "bottom_right": True}):
        verify(kernel(), plain, inputs(shape, dtype), rules, gradients=False).raise_if_failed()


@needs_nvcc
def test_lengths_of_both_kinds_and_a_scale():
    x = inputs((3, 1, 1, 5, 140, 64), torch.float16)
    for dtype in (torch.int32, torch.int64):
        rules = {"key_lengths": torch.tensor([140, 0, 129], dtype=dtype), "scale": 0.5}
        for more in (0, 9):
            verify(kernel(more=more), plain, x, rules, gradients=False).raise_if_failed()


@needs_nvcc
@pytest.mark.parametrize("dtype", MANGLED)
def test_without_keys(dtype):
    query, key, value = inputs((1, 2, 1, 130, 0, 64), dtype)
    for uniform in (False, True):
        output, sums = kernel()(query, key, value, uniform=uniform)
        assert (output == 0).all() and (sums == -torch.inf).all()


@needs_nvcc
def test_layouts():
    """Heads beside each other, as modules have them, packed beside other projections; rows of a larger buffer."""
    batch, heads, rows, width = 2, 2, 70, 64
    packed = torch.randn(batch, rows, 3, heads, width).bfloat16().permute(2, 0, 3, 1, 4)
    padded = torch.randn(batch, heads, rows + 3, width + 24).bfloat16()[:, :, 2:-1, 8:72]
    for x in (tuple(packed), (padded, *packed[1:]), (packed[0], padded, padded)):
        assert not any(t.is_contiguous() for t in x)
        verify(kernel(), plain, x, {"causal": True}, gradients=False).raise_if_failed()


@needs_nvcc
@pytest.mark.parametrize(("width", "dtype"), [(64, torch.bfloat16), (128, torch.float16)])
def test_what_is_masked_does_not_reach_the_result(width, dtype):
    """Infinite and NaN keys and values: rows that see them have them, as in the reference, and no others."""
    shape = (2, 1, 1, 139, 200, width)
    lengths = torch.tensor([200, 140])
    for rules in ({"causal": True}, {"key_lengths": lengths, "window": (9, 4)}):
        query, key, value = inputs(shape, dtype)
        value[:, :, 130, 3], value[:, :, 131, 5], value[:, :, 60, width - 1] = torch.nan, torch.inf, -torch.inf
        value[1, :, 140:], key[1, :, 145:], key[0, :, 70] = torch.nan, torch.inf, torch.nan
        verify(kernel(), plain, (query, key, value), rules, gradients=False).raise_if_failed()


@needs_nvcc
@pytest.mark.parametrize("broken", [False, True])
def test_schedules_and_bits(broken):
    """No race, wait or fence is missing under any order of the warps, and the bits are always the same."""
    x = inputs((1, 1, 1, 70, 270, 64), torch.bfloat16)
    if broken:
        x[2][:, :, 200] = torch.inf  # so that values are mended
    made = [kernel(schedule=schedule, seed=3)(*x, causal=True, bottom_right=True) for schedule in SCHEDULES]
    for output, sums in made[1:]:
        assert torch.equal(output.view(torch.int16), made[0][0].view(torch.int16))
        assert torch.equal(sums, made[0][1])


#: So that a changed kernel compiles in a third of the time: the others are left out.
ONE_KERNEL = (
    ("if (p.width == 64) return half ? forward<Fp16, 64>(p, device, stream) :", "return"),
    ("  return half ? forward<Fp16, 128>(p, device, stream) : forward<Bf16, 128>(p, device, stream);\n", ""),
)
#: What is taken out or changed -> what must be found.
FAULTS = {
    "the fence of the barriers": ("barrier_init_fence();", "", "missing fence"),
    "registers that nobody gives": ("registers_give<kProducerRegisters>();", "", "deadlock"),
    "registers that one lane of each warp gives": (
        "registers_give<kProducerRegisters>();", "if (threadIdx.x % 32 == 0) registers_give<kProducerRegisters>();",
        "collective",
    ),
    "more registers than there are": ("registers_take<kConsumerRegisters>();", "registers_take<256>();", "deadlock"),
    "the turn": ("if (which == 1 && block.tiles > 1) pass_turn();", "", "deadlock"),
    "the bytes of a tile": ("kTileBytes = kKeys * kWidth * 2", "kTileBytes = kKeys * kWidth * 2 + 16", "deadlock"),
    "the wait for queries": ("barrier_wait(tiles.query_full, 0);", "", "missing wait"),
    "the wait for an empty stage": ("barrier_wait(tiles.value_empty[stage], ", "void(", "missing wait"),
    "the wait for scores": ("wgmma_wait<1>(scores);", "", "missing wait"),
    "the wait for the output": ("wgmma_wait<0>(output);\n      keep(weights);", "", "missing wait"),
    "the fence of the output": ("kKeys * kSpan);\n    wgmma_fence();", "kKeys * kSpan);", "missing fence"),
    "a warp's arrival": ("barrier_init(tiles.value_empty[i], kConsumers * 4)",
                         "barrier_init(tiles.value_empty[i], kConsumers * 4 - 1)", "mbarrier"),
    "the fence of the result": ("async_fence();\n    named_sync(kOwn", "named_sync(kOwn", "missing fence"),
    "the wait for the result": ("tensor_store_wait();", "", "missing wait"),
    "the fence of mended values": ("async_fence();\n    named_sync(kBoth", "named_sync(kBoth", "missing fence"),
}  # fmt: skip


@needs_nvcc
@pytest.mark.parametrize("name", FAULTS)
def test_what_is_missing_is_found(name):
    old, new, expected = FAULTS[name]
    x = inputs((1, 1, 1, 70, 500, 64), torch.bfloat16)
    x[2][:, :, 450] = torch.inf
    reports: list = []
    kernel(((old, new), *ONE_KERNEL), reports)(*x, causal=True, bottom_right=True)
    assert expected in {fault.kind for fault in reports[0].faults}


@needs_nvcc
@pytest.mark.parametrize("width", [64, 128])
def test_counts(width):
    """The products that a causal call needs and no more, no bank conflict, each byte of global memory once."""
    reports: list = []
    kernel(reports=reports, counts=True)(*inputs((1, 1, 1, 256, 256, width), torch.bfloat16), causal=True)
    counts = reports[0].raise_if_faulty().counts
    tiles = 2 * (1 + 2)  # of two consumers in blocks of one and of two tiles
    products = {k: n for k, n in counts.matrix.items() if "wgmma" in k}
    scores, outputs = tiles * width // 16, tiles * TILE // 16
    expected = {128: scores, width: outputs} if width == 64 else {128: scores + outputs}
    assert products == {f"wgmma.mma_async.m64n{n}k16.f32.bf16.bf16": count for n, count in expected.items()}
    assert counts.conflicts == 0
    assert counts.sectors == counts.fewest


@needs_nvcc
def test_registers(tmp_path):
    """Nothing is spilled, and each role keeps to the registers that it has taken."""
    roles_keep_registers(SOURCE, tmp_path, 4, THREADS)
