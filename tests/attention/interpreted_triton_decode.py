"""Triton's attention on a cache in its interpreter; test_triton_decode.py runs this file, in a process for it."""

from __future__ import annotations

import pytest
import torch

from llmkern import backend
from llmkern.attention import reference
from llmkern.functional import attention_with_kvcache
from tests.attention.decode_cases import ONE_PIECE, PIECES, RULES, check, in_pages, inputs, ours
from tests.attention.decode_on_triton import serve
from tests.emulation.triton_interpreter import interpret, round_as_hardware

round_as_hardware()
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# (B, Sq, H, Hkv, D, Dv, keys)
SHAPES = {
    "one of everything": (1, 1, 1, 1, 1, 1, 1),
    "groups": (2, 1, 4, 2, 64, 64, 37),
    "two blocks of rows": (1, 3, 7, 1, 32, 16, 67),
    "primes": (1, 5, 2, 2, 17, 23, 131),
    "wide": (1, 2, 2, 1, 256, 200, 40),
    "no keys": (1, 2, 2, 1, 16, 16, 0),
    "no queries": (1, 0, 2, 1, 16, 16, 5),
    "no batch": (0, 1, 2, 1, 16, 16, 5),
    "no value width": (1, 1, 2, 1, 16, 0, 20),
}


@pytest.fixture(autouse=True)
def served(monkeypatch):
    serve(monkeypatch, interpret)
    yield
    backend.forget_plans()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape, dtype):
    if shape[0] and shape[1]:
        check(*inputs(*shape, dtype))
    else:
        assert ours(*inputs(*shape, dtype))[0].numel() == 0


@pytest.mark.parametrize("processors", [ONE_PIECE, PIECES])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_rules_and_lengths(rule, processors, monkeypatch):
    """The tokens behind the lengths are NaN; one sequence has none, one fewer than there are queries."""
    serve(monkeypatch, interpret, processors)
    dtype = FLOATS[(list(RULES.values()).index(rule) + (processors == PIECES)) % 2 * 2]
    q, k_cache, v_cache = inputs(3, 3, 2, 1, 16, 16, 600, dtype)
    lengths = torch.tensor([580, 0, 2], dtype=torch.int32)
    for b, length in enumerate(lengths.tolist()):
        k_cache[b, length:], v_cache[b, length:] = torch.nan, torch.nan
    options = dict(rule)
    tensors = [options.pop(name, None) for name in ("slopes", "sink")]
    check(q, k_cache, v_cache, lengths, None, None, None, *tensors, **options)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("processors", [ONE_PIECE, PIECES])
def test_int8_and_pages(processors, dtype, monkeypatch):
    """Scales of many magnitudes, of zeros too."""
    serve(monkeypatch, interpret, processors)
    q, *floats = inputs(2, 1, 4, 2, 24, 20, 300, dtype)
    caches = [torch.randint(-128, 128, x.shape, dtype=torch.int8) for x in floats]
    scales = [torch.rand(x.shape[:3]) * 10.0 ** torch.randint(-4, 1, x.shape[:3]) / 64 for x in floats]
    scales[0] = scales[0].clamp(max=0.02)
    scales[1][:, 3] = 0.0
    check(q, *caches, None, None, *scales)
    *pools, table = in_pages(7, *caches, *scales)
    paged = ours(q, *pools[:2], torch.tensor([300, 300]), table.int(), *pools[2:])
    assert torch.equal(paged[0], ours(q, *caches, None, None, *scales)[0])


def test_what_one_query_does_not_see_does_not_reach_it():
    for never in (torch.nan, torch.inf):
        q, k_cache, v_cache = inputs(1, 3, 4, 1, 16, 64, 20, torch.float16)
        expected = ours(q, k_cache, v_cache, causal=True)[0]
        k_cache[:, -1], v_cache[:, -1, :, ::5], v_cache[:, -2, :, 7] = never, never, never
        out = ours(q, k_cache, v_cache, causal=True)[0]
        torch.testing.assert_close(out[:, 0], expected[:, 0], rtol=2e-3, atol=2e-3)
        assert not out[:, 1, :, 7].isfinite().any()
        torch.testing.assert_close(out[:, 1, :, 8:], expected[:, 1, :, 8:], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("processors", [ONE_PIECE, PIECES])
def test_large_scores_in_float32(processors, monkeypatch):
    """Whose exponents, rounded before the largest is taken off, would be wrong by more than the plain version is."""
    serve(monkeypatch, interpret, processors)
    q, *caches = inputs(1, 1, 4, 2, 64, 24, 300, torch.float32)
    check(q * 30, *caches, sink=torch.tensor([0.5, 90.0, -1.0, 40.0]))


BEFORE = torch.tensor([5, 0, 17])


def written(served, dtype, rotated, interleaved, int8, pooled, causal, table_dtype=torch.float32):
    """(output, log-sum-exp, caches, scales) of a call with three new tokens."""
    torch.manual_seed(1)
    size, width, value_width = 21, 20, 13
    q, k, v = (torch.randn(3, 3, h, d).to(dtype) for h, d in ((4, width), (2, width), (2, value_width)))
    k[0, 0, 0], v[0, 1, 1] = 0.0, 0.0
    caches = [torch.randn(3, size, 2, d).to(dtype) for d in (width, value_width)]
    scales, table = [None, None], None
    if int8:
        caches = [(40 * c.float()).clamp(-127, 127).to(torch.int8) for c in caches]
        scales = [torch.rand(3, size, 2) / 40 for _ in caches]
    if pooled:
        *pools, table = in_pages(4, *caches, *(s for s in scales if s is not None))
        caches, scales = pools[:2], pools[2:] or scales
    angle = torch.rand(24, rotated // 2) * 6
    tables = [angle.cos().to(table_dtype), angle.sin().to(table_dtype)] if rotated else [None, None]
    if served:
        out = attention_with_kvcache(
            q, *caches, k, v, *tables, BEFORE, table, None, causal, rotary_interleaved=interleaved, k_scale=scales[0],
            v_scale=scales[1], return_softmax_lse=True,
        )  # fmt: skip
    else:
        out = reference.attention_kvcache(
            q, *caches, k, v, *tables, BEFORE, table, *scales, None, None, -1, 0 if causal else -1, 0.0, width**-0.5,
            interleaved,
        )  # fmt: skip
    return [*out, *caches, *scales]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(
    ("rotated", "interleaved", "pooled", "causal"),
    [(0, False, False, True), (20, False, True, True), (10, True, False, False), (20, True, True, True)],
)
def test_new_tokens(rotated, interleaved, pooled, causal, int8, dtype):
    """The very elements, integers and scales of the reference."""
    args = dtype, rotated, interleaved, int8, pooled, causal
    got, expected = written(True, *args), written(False, *args)
    for a, b in zip(got[2:], expected[2:], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    torch.testing.assert_close(got[0], expected[0], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", FLOATS)
def test_zeros_infinities_and_nan_in_an_int8_cache(dtype):
    results = []
    for call in (attention_with_kvcache, reference.attention_kvcache):
        q, k, v = inputs(1, 2, 2, 2, 16, 16, 2, dtype)
        k[0, 0, 0], k[0, 1, 0, 3], v[0, 1, 1, 5] = 0.0, torch.inf, torch.nan
        caches = [torch.full((1, 8, 2, 16), 9, dtype=torch.int8) for _ in range(2)]
        scales = [torch.full((1, 8, 2), 7.0) for _ in range(2)]
        lengths = torch.tensor([3])
        if call is attention_with_kvcache:
            call(q, *caches, k, v, None, None, lengths, k_scale=scales[0], v_scale=scales[1])
        else:
            call(q, *caches, k, v, None, None, lengths, None, *scales, None, None, -1, -1, 0.0, 0.25, True)
        results.append([*caches, *(s.nan_to_num(-1.0) for s in scales)])
    assert all(map(torch.equal, *results))


def test_what_lies_outside_is_neither_written_nor_read():
    """Tokens past the cache, pages outside the pool, positions outside the tables: the host does not look."""
    q, k, v = inputs(3, 3, 2, 2, 16, 16, 3, torch.float16)
    pools = [torch.zeros(8, 4, 2, 16, dtype=torch.float16) for _ in range(2)]
    angle = torch.rand(8, 8)
    table = torch.tensor([[0, 1], [2, 3], [4, 5]])
    for lengths in ([-2, 40, 2**31 - 1], [6, 7, -(2**31)]):
        caches = [p.clone() for p in pools]
        attention_with_kvcache(q, *caches, k, v, angle.cos(), angle.sin(), torch.tensor(lengths), table, causal=True)
        changed = (caches[1] != 0).any(-1).sum()
        assert changed == sum(0 <= n + i < 8 for n in lengths for i in range(3)) * 2
    table = torch.tensor([[-1, 8], [2**30, -5], [99, 98]])
    attention_with_kvcache(q, *pools, k, v, None, None, torch.tensor([0, 1, 3]), table)
    assert not pools[0].any() and not pools[1].any()


def test_layouts():
    q, *caches = inputs(2, 1, 4, 2, 16, 16, 21, torch.float16)
    expected = ours(q, *caches)[0]
    by_head = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in caches]
    in_rows = [torch.cat([x, x], -1)[..., :16] for x in (q, *caches)]
    off = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x) for x in (q, *caches)]
    apart = q.transpose(1, 3).contiguous().transpose(1, 3)
    for some in ((q, *by_head), in_rows, off, (apart, *caches)):
        assert torch.equal(ours(*some)[0], expected)
