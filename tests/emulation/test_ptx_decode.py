"""The PTX of csrc/attention/cuda_decode.cu behind its Python backend, against the reference."""

from __future__ import annotations

import functools

import pytest
import torch

from llmkern import backend
from llmkern.attention import cuda_decode, reference
from llmkern.functional import attention_with_kvcache
from llmkern.verify import verify
from tests.attention.decode_cases import ONE_PIECE, PIECES, RULES, check, in_pages, inputs, ours
from tests.emulation import compilers
from tests.emulation.attention_on_ptx import DECODE, CachedOnEmulator, serve_cached

pytestmark = pytest.mark.skipif(compilers.NVCC is None, reason=compilers.NO_NVCC)
HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture
def emulated(monkeypatch):
    found = CachedOnEmulator()
    serve_cached(monkeypatch, found, ONE_PIECE)
    yield found
    backend.forget_plans()


SHAPES = {
    "one key": (1, 1, 1, 1, 64, 64, 1),
    "groups": (2, 1, 4, 2, 64, 64, 37),
    "two passes": (1, 3, 7, 1, 128, 128, 67),
    "tails of heads": (1, 1, 2, 2, 80, 96, 33),
    "wide": (1, 2, 2, 1, 256, 200, 40),
    "narrow": (1, 1, 2, 1, 8, 16, 19),
    "odd heads": (1, 1, 2, 1, 20, 13, 18),
    "odd values": (1, 1, 2, 1, 64, 20, 18),
    "wider values": (1, 1, 2, 1, 64, 128, 18),
}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape, dtype, emulated):
    check(*inputs(*shape, dtype))


@pytest.mark.parametrize("processors", [ONE_PIECE, PIECES])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_rules_and_lengths(rule, processors, emulated, monkeypatch):
    """The tokens behind the lengths are NaN; one sequence has none, one fewer than there are queries."""
    serve_cached(monkeypatch, emulated, processors)
    q, k_cache, v_cache = inputs(3, 3, 2, 1, 64, 64, 300, torch.float16)
    lengths = torch.tensor([280, 0, 2], dtype=torch.int32)
    for b, length in enumerate(lengths.tolist()):
        k_cache[b, length:], v_cache[b, length:] = torch.nan, torch.nan
    check(q, k_cache, v_cache, lengths, **rule)
    assert (emulated.last("join_pieces_kernel") is not None) == (processors == PIECES)


def test_keys_that_were_just_appended_are_seen(emulated):
    """The lengths in memory are those from before."""
    q, *caches = inputs(2, 2, 2, 1, 64, 64, 40, torch.float16)
    new, lengths = [torch.randn(2, 2, 1, 64, dtype=torch.float16) for _ in range(2)], torch.tensor([37, 16])

    def function(kernel, q, k_cache, v_cache, k, v):
        k_cache, v_cache = k_cache.clone(), v_cache.clone()
        if kernel:
            return attention_with_kvcache(
                q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True, return_softmax_lse=True
            )
        options = [None, None, lengths, *[None] * 5, -1, 0, 0.0, 64**-0.5, True]
        return reference.attention_kvcache(q, k_cache, v_cache, k, v, *options)

    kernels = (functools.partial(function, kernel) for kernel in (True, False))
    verify(*kernels, (q, *caches, *new), gradients=False).raise_if_failed()


@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
@pytest.mark.parametrize("size", [16, 5])
def test_pages(size, integers, emulated):
    q, *caches = inputs(2, 1, 2, 1, 64, 72, 41, torch.bfloat16)
    *pools, table = in_pages(size, *caches)
    lengths = torch.tensor([41, 18], dtype=integers)
    check(q, *pools, lengths, table.to(integers))
    assert torch.equal(ours(q, *pools, lengths, table.to(integers))[0], ours(q, *caches, lengths)[0])


def test_a_page_outside_the_pool_is_not_read(emulated):
    q, *caches = inputs(1, 1, 1, 1, 64, 64, 32, torch.float16)
    for table in ([[0, 2]], [[-1, 1]]):
        out = ours(q, *(c.view(2, 16, 1, 64) for c in caches), None, torch.tensor(table))[0]
        inside = torch.tensor(table).clamp(0, 1)
        assert torch.equal(out, ours(q, *(c.view(2, 16, 1, 64) for c in caches), None, inside)[0])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(2, 1, 4, 1, 64, 128, 37), (1, 2, 2, 1, 256, 144, 300), (1, 1, 2, 1, 24, 20, 21)])
def test_int8(shape, dtype, emulated, monkeypatch):
    """Scales of many magnitudes, of zeros too; the values' are no small numbers in float16."""
    serve_cached(monkeypatch, emulated, PIECES)
    q, *floats = inputs(*shape, dtype)
    caches = [torch.randint(-128, 128, x.shape, dtype=torch.int8) for x in floats]
    scales = [torch.rand(x.shape[:3]) * 10.0 ** torch.randint(-4, 1, x.shape[:3]) / 64 for x in floats]
    scales[0] = scales[0].clamp(max=0.02)
    scales[1][:, 3] = 0.0
    check(q, *caches, None, None, *scales)
    *pools, table = in_pages(16, *caches, *scales)
    lengths = torch.full((q.size(0),), floats[0].size(1))
    paged = ours(q, *pools[:2], lengths, table, *pools[2:])
    assert torch.equal(paged[0], ours(q, *caches, lengths, None, *scales)[0])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("never", [torch.nan, torch.inf])
def test_what_one_query_does_not_see_does_not_reach_it(never, dtype, emulated):
    q, k_cache, v_cache = inputs(1, 3, 4, 1, 64, 64, 20, dtype)
    expected = ours(q, k_cache, v_cache, causal=True)[0]
    k_cache[:, -1], v_cache[:, -1, :, ::5], v_cache[:, -2, :, 7] = never, never, never
    out = ours(q, k_cache, v_cache, causal=True)[0]
    assert torch.equal(out[:, 0], expected[:, 0])
    assert out[:, 1, :, 7].isnan().any() or out[:, 1, :, 7].isinf().any()
    assert torch.equal(out[:, 1, :, 8:], expected[:, 1, :, 8:])


def test_int8_scales_that_one_query_does_not_see(emulated):
    q, *floats = inputs(1, 2, 1, 1, 64, 64, 20, torch.float16)
    caches = [(40 * x).clamp(-127, 127).to(torch.int8) for x in floats]
    scales = [torch.full((1, 20, 1), 0.02) for _ in caches]
    expected = ours(q, *caches, None, None, *scales, causal=True)[0]
    for scale in scales:
        scale[:, -1] = torch.nan
    out = ours(q, *caches, None, None, *scales, causal=True)[0]
    assert torch.equal(out[:, 0], expected[:, 0]) and out[:, 1].isnan().all()


def test_layouts(emulated):
    """Heads before tokens, parts of wider rows, and addresses off a multiple of 16 bytes."""
    q, *caches = inputs(2, 1, 4, 2, 64, 64, 21, torch.float16)
    expected = ours(q, *caches)[0]
    by_head = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in caches]
    in_rows = [torch.cat([x, x], -1)[..., :64] for x in (q, *caches)]
    off = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x) for x in (q, *caches)]
    for some in ((q, *by_head), in_rows, off, (off[0], *caches)):
        assert torch.equal(ours(*some)[0], expected)
    narrow = [x[..., :20] for x in (q, *caches)]  # rows lie at multiples of 16 bytes, and end elsewhere
    assert torch.equal(ours(*narrow)[0], ours(*(x.contiguous() for x in narrow))[0])


def test_more_pieces_than_a_block_joins_are_refused(emulated, monkeypatch):
    monkeypatch.setattr(cuda_decode, "pieces", lambda *args: 129)
    with pytest.raises(ValueError, match="attention_decode: expected 1 to 128 pieces, got 129"):
        ours(*inputs(1, 1, 1, 1, 64, 64, 20, torch.float16))


@pytest.mark.parametrize("count", [2, 7, 128])
@pytest.mark.parametrize("value_width", [8, 20, 72, 200])
def test_pieces_of_any_number_and_width(value_width, count, emulated, monkeypatch):
    """Some pieces have no key."""
    monkeypatch.setattr(cuda_decode, "pieces", lambda *args: count)
    check(*inputs(1, 2, 3, 1, 64, value_width, 90, torch.float16), causal=True, sink=torch.tensor([0.3, -2.0, 9.0]))


@pytest.mark.parametrize("schedule", ["forward", "reverse", "random"])
def test_schedules(schedule, emulated, monkeypatch):
    emulated.options["schedule"] = schedule
    q, *caches = inputs(1, 1, 2, 1, 64, 64, 130, torch.float16)
    out = ours(q, *caches)[0]
    emulated.options["schedule"] = "lockstep"
    assert torch.equal(ours(q, *caches)[0], out)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("int8", [False, True])
def test_keys_and_values_are_read_once(width, int8, emulated):
    """By loads of 16 bytes, which move little more than they must."""
    emulated.options["counts"] = True
    q, *caches = inputs(1, 1, 8, 1, width, width, 96, torch.float16)
    scales = [None, None]
    if int8:
        caches, scales = [c.to(torch.int8) for c in caches], [torch.ones(c.shape[:3]) for c in caches]
    ours(q, *caches, None, None, *scales)
    counts = emulated.last("decode_kernel").counts
    of_caches = [s for s in counts.sites if s.space == "global" and not s.writes and "v4" in s.text]
    read = sum(s.bytes for s in of_caches)
    of_query = q.numel() * q.element_size()
    assert read == sum(c.numel() * c.element_size() for c in caches) + of_query
    assert sum(s.units for s in of_caches) <= 1.05 * sum(s.fewest for s in of_caches)
    floor = read / 32 + (sum(s.numel() * 4 for s in scales) / 32 if int8 else 0)
    assert counts.touched[0] <= 1.02 * floor + 1


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("int8", [False, True])
def test_pieces_are_written_and_joined_in_whole_sectors(width, int8, emulated, monkeypatch):
    """All accesses to what the pieces have of the outputs, and to the output, are of 16 bytes."""
    serve_cached(monkeypatch, emulated, PIECES)
    emulated.options["counts"] = True
    q, *caches = inputs(1, 1, 8, 1, width, width, 600, torch.float16)
    scales = [None, None]
    if int8:
        caches, scales = [c.to(torch.int8) for c in caches], [torch.ones(c.shape[:3]) for c in caches]
    ours(q, *caches, None, None, *scales)
    attend, join = (emulated.last(name).counts for name in ("decode_kernel", "join_pieces_kernel"))
    for counts in (attend, join):
        assert sum(counts.sectors) <= 1.05 * sum(counts.fewest)
    of_pieces, of_output = 8 * 3 * width * 4, 8 * width * 2
    for counts, writes, moved in ((attend, True, of_pieces), (join, False, of_pieces), (join, True, of_output)):
        sites = [s for s in counts.sites if s.space == "global" and s.writes == writes and "v4" in s.text]
        assert sum(s.bytes for s in sites) == moved and sum(s.units for s in sites) == moved // 32
    assert join.conflicts == 0


def test_the_only_piece_writes_its_output_in_whole_sectors(emulated):
    emulated.options["counts"] = True
    ours(*inputs(1, 1, 8, 1, 128, 128, 20, torch.float16))
    counts = emulated.last("decode_kernel").counts
    assert counts.sectors[1] == counts.fewest[1] == 8 * 128 * 2 // 32 + 8 * 8 // 32  # and the log-sum-exp


def test_in_the_loop_no_bank_conflicts(emulated):
    """The queries are read from shared memory again for every tile."""
    emulated.options["counts"] = True
    ours(*inputs(1, 1, 8, 1, 64, 64, 96, torch.float16))
    sites = emulated.last("decode_kernel").counts.sites
    loads = [s for s in sites if s.space == "shared" and not s.writes and "v4" in s.text]
    assert loads and all(s.units == s.fewest for s in loads)


def cut(source: str, begin: str, end: str) -> str:
    at = source.index(begin)
    return source[at : source.index(end, at)]


def one_kernel() -> tuple[tuple[str, str], ...]:
    """Changes that leave one kernel of the many, which compiles quickly."""
    source = DECODE.read_text()
    chosen = cut(source, "  auto* kernel = decode_kernel<T, K, 256", "  // Of int8 values")
    typed = cut(source, "  bool bf16 = p.dtype", "}\n")
    return (
        (chosen, "  auto* kernel = decode_kernel<T, K, 64, true>;\n"),
        (typed, "  decode_typed<Fp16, Fp16>(p, workspace, splits, device, stream);\n"),
    )


FAULTS = {
    "no barrier": ("query_aligned, queries);\n  __syncthreads();", "query_aligned, queries);", "uninitialised|race"),
    "a key too many": ("key >= first && key < end)", "key >= first && key <= end)", "out of bounds"),
    "not rescaled": (") state.scale(alpha[0], alpha[1]);", ");", "output"),
}


@pytest.mark.parametrize(("old", "new", "message"), FAULTS.values(), ids=FAULTS)
def test_planted_faults_are_found(old, new, message, emulated):
    emulated.use(compilers.nvcc(DECODE, "80", (*one_kernel(), (old, new))))
    emulated.options["schedule"] = "reverse" if "sync" in old else "lockstep"
    with pytest.raises(AssertionError, match=message):
        check(*inputs(1, 1, 2, 1, 64, 64, 150, torch.float16))
