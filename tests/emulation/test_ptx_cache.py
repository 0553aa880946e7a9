"""The PTX of csrc/attention/cuda_cache.cu behind its Python backend: what it writes, against the reference."""

from __future__ import annotations

import pytest
import torch

from llmkern import backend
from llmkern.attention import reference
from llmkern.functional import attention_with_kvcache
from tests.emulation import compilers
from tests.emulation.attention_on_ptx import CachedOnEmulator, serve_cached

pytestmark = pytest.mark.skipif(compilers.NVCC is None, reason=compilers.NO_NVCC)
HALVES = [torch.float16, torch.bfloat16]
BEFORE = torch.tensor([5, 0, 17])
B, H, HKV, SIZE, PAGE = 3, 4, 2, 21, 4


class OnlyAppend(CachedOnEmulator):
    """What attends to the cache is not run, but kept: the rotated queries are its argument."""

    query: torch.Tensor

    def attention_decode_cuda(self, plan, device, stream, splits, workspace, *tensors):
        self.query = tensors[7]


@pytest.fixture
def emulated(monkeypatch):
    found = OnlyAppend()
    serve_cached(monkeypatch, found, 1)
    yield found
    backend.forget_plans()


def inputs(width, value_width, new, dtype, size=SIZE):
    torch.manual_seed(width)
    shapes = (new, H, width), (new, HKV, width), (new, HKV, value_width), (size, HKV, width), (size, HKV, value_width)
    return [torch.randn(B, *shape).to(dtype) for shape in shapes]


def angles(rotated, dtype):
    angle = torch.rand(SIZE + 3, rotated // 2) * 6
    return angle.cos().to(dtype), angle.sin().to(dtype)


def expected(
    q, k_cache, v_cache, k, v, cos=None, sin=None, table=None, k_scale=None, v_scale=None, dtype=None, **options
):
    """The caches, scales and turned queries as the reference has them, in `dtype`."""
    seen = {}

    def attention(query, *rest):
        seen["query"] = query
        return query, query

    wide = [t if t is None or dtype is None else t.to(dtype) for t in (q, k, v, cos, sin)]
    caches = [t.clone() if dtype is None or t.dtype == torch.int8 else t.to(dtype) for t in (k_cache, v_cache)]
    scales = [None if t is None else t.clone() for t in (k_scale, v_scale)]
    reference.kvcache.cache.attend(
        attention, wide[0], *caches, *wide[1:], BEFORE, table, *scales, None, None, -1,
        0 if options.get("causal") else -1, 0.0, 1.0, options.get("rotary_interleaved", True),
    )  # fmt: skip
    return [*caches, *scales, seen["query"].transpose(1, 2)]


def found(emulated, q, k_cache, v_cache, k, v, cos=None, sin=None, table=None, k_scale=None, v_scale=None, **options):
    """The same, as the kernel writes them."""
    made = [None if t is None else t.clone() for t in (k_cache, v_cache, k_scale, v_scale)]
    attention_with_kvcache(
        q, *made[:2], k, v, cos, sin, BEFORE, table, k_scale=made[2], v_scale=made[3], **options
    )  # fmt: skip
    return [*made, emulated.query]


def pages(*caches):
    count = -(-SIZE // PAGE)
    table = torch.randperm(B * count + 2)[: B * count].view(B, count)
    return [torch.full((B * count + 2, PAGE, *c.shape[2:]), 55, dtype=c.dtype) for c in caches], table


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("widths", [(64, 64), (128, 72), (256, 8), (20, 13)])
def test_written_as_they_are(widths, dtype, emulated):
    q, k, v, k_cache, v_cache = inputs(*widths, 3, dtype)
    for pooled in (False, True):
        caches, table = pages(k_cache, v_cache) if pooled else ([k_cache, v_cache], None)
        args = (q, *caches, k, v, None, None, table)
        ours, plain = found(emulated, *args), expected(*args)
        assert torch.equal(ours[0], plain[0]) and torch.equal(ours[1], plain[1])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
@pytest.mark.parametrize(("width", "rotated"), [(64, 64), (128, 48), (256, 256), (24, 10)])
def test_rotated(width, rotated, interleaved, dtype, emulated):
    """Within the contract: no further from the truth than twice the reference, in one unit of the last place."""
    q, k, v, k_cache, v_cache = inputs(width, 16, 3, dtype)
    for table_dtype in (torch.float32, dtype):
        for causal in (True, False):
            args = (q, k_cache, v_cache, k, v, *angles(rotated, table_dtype))
            options = {"rotary_interleaved": interleaved, "causal": causal}
            ours = found(emulated, *args, **options)
            plain, truth = expected(*args, **options), expected(*args, dtype=torch.float64, **options)
            for x, r, t in ((ours[0], plain[0], truth[0]), (ours[4], plain[4], truth[4])):
                ulp = torch.finfo(dtype).eps * t.abs().max()
                assert (x.double() - t).abs().max() <= 2 * (r.double() - t).abs().max() + ulp
                assert torch.equal(x[..., rotated:], r[..., rotated:])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("widths", [(64, 128), (20, 13)])
@pytest.mark.parametrize("pooled", [False, True])
def test_int8(pooled, widths, dtype, emulated):
    """The very integers and scales of the reference; zeros, infinities and NaN included."""
    q, k, v, k_cache, v_cache = inputs(*widths, 3, dtype)
    k[0, 0, 0], k[0, 1, 0, 3], v[1, 2, 1, 5] = 0.0, torch.inf, torch.nan
    caches = [torch.full(c.shape, 9, dtype=torch.int8) for c in (k_cache, v_cache)]
    scales, table = [torch.full(c.shape[:3], 7.0) for c in caches], None
    if pooled:
        (*caches, k_scale, v_scale), table = pages(*caches, *scales)
        scales = [k_scale, v_scale]
    args = (q, *caches, k, v, None, None, table, *scales)
    for ours, plain in zip(found(emulated, *args)[:4], expected(*args)[:4], strict=True):
        assert torch.equal(ours.nan_to_num(-1.0), plain.nan_to_num(-1.0))


def test_int8_rotated(emulated):
    """The rotated elements, rounded first, are what is quantised: those that a cache of 16-bit elements would have. One
    off from the reference where they are rounded another way."""
    q, k, v, k_cache, v_cache = inputs(64, 64, 3, torch.bfloat16)
    caches = [torch.zeros(c.shape, dtype=torch.int8) for c in (k_cache, v_cache)]
    scales = [torch.zeros(c.shape[:3]) for c in caches]
    tables = angles(32, torch.float32)
    args = (q, *caches, k, v, *tables, None, *scales)
    ours, plain = found(emulated, *args), expected(*args)
    assert torch.equal(ours[1], plain[1]) and torch.equal(ours[3], plain[3])
    torch.testing.assert_close(ours[0] * ours[2][..., None], plain[0] * plain[2][..., None], rtol=0.0, atol=0.05)
    rounded = found(emulated, q, *(c.bfloat16() for c in caches), k, v, *tables)[0].float()
    scale = rounded.abs().amax(-1) / 127
    assert torch.equal(ours[2], scale)
    assert torch.equal(ours[0], (rounded / scale.clamp(min=1e-30)[..., None]).round().to(torch.int8))


def test_layouts(emulated):
    q, k, v, k_cache, v_cache = inputs(64, 64, 3, torch.float16)
    args = (*angles(64, torch.float32),)
    plain = found(emulated, q, k_cache, v_cache, k, v, *args)
    off = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x) for x in (q, k, v)]
    by_head = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    for some in (off, by_head):
        ours = found(emulated, some[0], k_cache, v_cache, *some[1:], *args)
        assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True) if a is not None)


def test_angles_whose_rows_lie_apart(emulated):
    q, k, v, k_cache, v_cache = inputs(64, 64, 3, torch.float16)
    for dtype in (torch.float32, torch.float16):
        cos, sin = angles(64, dtype)
        plain = found(emulated, q, k_cache, v_cache, k, v, cos, sin)
        for tables in ((torch.cat([cos, cos], -1)[:, :32], sin), (cos, torch.cat([sin, sin, sin], -1)[:, 32:64])):
            ours = found(emulated, q, k_cache, v_cache, k, v, *tables)
            assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True) if a is not None)


def test_what_lies_outside_is_neither_written_nor_read(emulated):
    """Tokens past the cache, pages outside the pool, positions outside the tables: the host does not look."""
    q, k, v, k_cache, v_cache = inputs(64, 64, 3, torch.float16)
    cos, sin = angles(64, torch.float32)
    pools, table = pages(k_cache, v_cache)
    options = {"causal": True, "block_table": table}
    for lengths in ([-2, SIZE + 40, 2**31 - 1], [22, 23, -(2**31)]):
        caches = [p.clone() for p in pools]
        attention_with_kvcache(q, *caches, k, v, cos, sin, torch.tensor(lengths), **options)
        changed = (caches[0] != pools[0]).any(-1).sum()
        assert changed == sum(0 <= n + i < 4 * table.size(1) for n in lengths for i in range(3)) * HKV
    outside = torch.tensor([22, 0, 0])  # the tables have 24 rows
    attention_with_kvcache(q, *pools, k, v, cos, sin, outside, **options)
    assert emulated.query[0, 2].isnan().all() and not emulated.query[0, :2].isnan().any()
    table[:] = torch.tensor([-1, len(pools[0]), 2**30, -5, 99, 98])
    before = [p.clone() for p in pools]
    attention_with_kvcache(q, *pools, k, v, cos, sin, BEFORE, **options)
    assert torch.equal(pools[0], before[0]) and torch.equal(pools[1], before[1])


@pytest.mark.parametrize("schedule", ["reverse", "random"])
def test_traffic(schedule, emulated):
    """Each byte once, by 16-byte accesses, in any order of the warps."""
    emulated.options = {"counts": True, "schedule": schedule}
    found(emulated, *[inputs(128, 128, 3, torch.float16)[i] for i in (0, 3, 4, 1, 2)])
    counts = emulated.last("cache_kernel").counts
    floor = 2 * B * 3 * HKV * 128 * 2 / 32
    assert counts.touched[1] == floor and counts.sectors[1] <= 1.05 * floor
    assert counts.touched[0] <= 1.05 * floor + 1 and counts.sectors[0] <= 1.05 * counts.fewest[0] + 1


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
@pytest.mark.parametrize(("width", "rotated"), [(128, 128), (128, 64), (64, 64)])
def test_traffic_of_rotation(width, rotated, interleaved, table_dtype, emulated):
    """Of the rows each byte once; of the tables each sector once by the rows of a warp. Halves are whole sectors."""
    emulated.options["counts"] = True
    q, k, v, k_cache, v_cache = inputs(width, width, 3, torch.float16)
    found(
        emulated, q, k_cache, v_cache, k, v, *angles(rotated, table_dtype), rotary_interleaved=interleaved, causal=True
    )
    counts = emulated.last("cache_kernel").counts
    rows = (B * 3 * (2 * HKV + H)) * width * 2 // 32
    assert counts.sectors[1] == counts.touched[1] == rows
    assert counts.sectors[0] <= 1.05 * counts.fewest[0]
    wide = sum(s.bytes for s in counts.sites if s.space == "global" and s.writes and "v4" in s.text)
    assert wide == 32 * rows
