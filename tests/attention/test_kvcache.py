"""Attention to a cache: what it writes and what it sees, for static, paged and int8 caches, rotated and not."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from llmkern import backend
from llmkern.attention.cache import _read
from llmkern.functional import attention_with_kvcache, rotary, scaled_dot_product_attention
from llmkern.verify import verify

B, H, HKV, D, DV, SIZE, PAGE = 3, 4, 2, 16, 12, 24, 4
BEFORE = torch.tensor([5, 0, 17])


def inputs(new=3, queries=3, dtype=torch.float32):
    shapes = (B, queries, H, D), (B, new, HKV, D), (B, new, HKV, DV), (B, SIZE, HKV, D), (B, SIZE, HKV, DV)
    return [torch.randn(s, dtype=dtype) for s in shapes]


def paged(k_cache, v_cache):
    """The same in pages, in a random order and among others."""
    pages = SIZE // PAGE
    table = torch.randperm(B * pages + 3)[: B * pages].view(B, pages)
    result = []
    for x in (k_cache, v_cache):
        never = torch.nan if x.is_floating_point() else 77
        pool = torch.full((B * pages + 3, PAGE, *x.shape[2:]), never, dtype=x.dtype)
        pool[table] = x.view(B, pages, PAGE, *x.shape[2:])
        result.append(pool)
    return *result, table


def expected(q, k, v, k_cache, v_cache, before=BEFORE, **options):
    """The new tokens written by a loop, and attention over each sequence by itself."""
    keys, values = k_cache.clone(), v_cache.clone()
    outputs = []
    for b, length in enumerate(before.tolist()):
        if k is not None:
            keys[b, length : length + k.size(1)], values[b, length : length + k.size(1)] = k[b], v[b]
            length += k.size(1)
        one = (t[b : b + 1].transpose(1, 2) for t in (q, keys[:, :length], values[:, :length]))
        outputs.append(
            scaled_dot_product_attention(*one, enable_gqa=True, causal_alignment="bottom_right", **options)
        )  # fmt: skip
    return torch.cat(outputs).transpose(1, 2), keys, values


OPTIONS = {
    "all": ({}, {}),
    "causal": ({"causal": True}, {"is_causal": True}),
    "window": ({"window_size": (4, 1)}, {"window_size": (4, 1)}),
    "cap": ({"softcap": 1.5, "softmax_scale": 0.7}, {"softcap": 1.5, "scale": 0.7}),
    "slopes": ({"alibi_slopes": torch.rand(H), "causal": True}, {"alibi_slopes": None, "is_causal": True}),
    "sink": ({"learnable_sink": torch.randn(H)}, {"learnable_sink": None}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPTIONS)
def test_static_and_paged(name, dtype, isa):
    q, k, v, k_cache, v_cache = inputs(dtype=dtype)
    options, dense = OPTIONS[name]
    dense = {key: options[key] if value is None else value for key, value in dense.items()}
    output, keys, values = expected(q, k, v, k_cache, v_cache, **dense)
    pages = paged(k_cache, v_cache)
    found, sums = attention_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=BEFORE, return_softmax_lse=True, **options
    )  # fmt: skip
    assert sums.shape == (B, H, 3) and sums.dtype == torch.float64
    torch.testing.assert_close(found, output)
    assert torch.equal(k_cache, keys) and torch.equal(v_cache, values)
    *pools, table = pages
    same = attention_with_kvcache(q, *pools, k, v, cache_seqlens=BEFORE.int(), block_table=table.int(), **options)
    assert torch.equal(same, found)
    assert torch.equal(pools[0][table].flatten(1, 2), keys) and torch.equal(pools[1][table].flatten(1, 2), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("queries", "page", "width", "value_width"),
    [(1, 16, 24, 20), (3, 256, 24, 20), (16, 24, 24, 20), (90, 16, 24, 20), (90, 100, 24, 20),
     (1, 64, 64, 64), (2, 128, 80, 96), (3, 192, 128, 32), (1, 16, 64, 64)],
)  # fmt: skip
@pytest.mark.parametrize("int8", [False, True])
def test_long_caches(queries, page, width, value_width, int8, dtype, isa):
    """Static and paged bit for bit; also as the dense operator has it, of which int8 is read into its dtype."""
    size, lengths = 1800, torch.tensor([1290, 37, 700])
    q, k, v = (torch.randn(B, queries, h, d).to(dtype) for h, d in ((H, width), (HKV, width), (HKV, value_width)))
    caches = [torch.randn(B, size, HKV, d).to(dtype) for d in (width, value_width)]
    scales = {}
    if int8:
        caches = [(c.float() * 40).clamp(-127, 127).to(torch.int8) for c in caches]
        scales = {name: torch.rand(B, size, HKV) / 40 for name in ("k_scale", "v_scale")}
    paged_size = -(-size // page) * page
    table = torch.randperm(B * paged_size // page).view(B, -1).int()

    def in_pages(t):
        t = torch.cat([t, t.new_full((B, paged_size - size, *t.shape[2:]), 55)], 1)
        pool = torch.empty(B * paged_size // page, page, *t.shape[2:], dtype=t.dtype)
        pool[table.long()] = t.view(B, -1, page, *t.shape[2:])
        return pool

    pools, pool_scales = [in_pages(c) for c in caches], {n: in_pages(s) for n, s in scales.items()}
    options = {"cache_seqlens": lengths, "causal": True}
    found = attention_with_kvcache(q, *caches, k, v, **options, **scales)
    again = attention_with_kvcache(q, *pools, k, v, block_table=table, **options, **pool_scales)
    assert torch.equal(found, again)
    dense = [c.float() * scales[n][..., None] for c, n in zip(caches, scales, strict=True)] if int8 else caches
    plain = scaled_dot_product_attention(
        q.transpose(1, 2), *(c.to(dtype).transpose(1, 2) for c in dense), enable_gqa=True, is_causal=True,
        key_lengths=lengths + queries, causal_alignment="bottom_right",
    )  # fmt: skip
    assert torch.equal(found, plain.transpose(1, 2))


def test_contract_against_float64(isa):
    q, _, _, k_cache, v_cache = inputs(queries=1)

    def ours(q, k_cache, v_cache):
        return attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=BEFORE)

    def plain(q, k_cache, v_cache):
        keys, values = (t.transpose(1, 2).repeat_interleave(H // HKV, 1) for t in (k_cache, v_cache))
        scores = q.transpose(1, 2) @ keys.transpose(2, 3) / D**0.5
        scores = scores.masked_fill(torch.arange(SIZE) >= BEFORE[:, None, None, None], -torch.inf)
        return (scores.softmax(-1).nan_to_num(0.0) @ values).transpose(1, 2)

    verify(ours, plain, (q, k_cache, v_cache), gradients=False).raise_if_failed()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_rotary(interleaved, causal):
    q, k, v, k_cache, v_cache = inputs()
    angle = torch.rand(SIZE, 6)
    cos, sin = angle.cos(), angle.sin()
    position = BEFORE[:, None] + torch.arange(3)
    turned = rotary(k.transpose(1, 2), None, cos, sin, interleaved=interleaved, position_ids=position)[0]
    # Without an order, flash-attention has all queries stand where the cache ended.
    position = position if causal else BEFORE[:, None].expand(-1, 3)
    turned_q = rotary(q.transpose(1, 2), None, cos, sin, interleaved=interleaved, position_ids=position)[0]
    output, keys, _ = expected(
        turned_q.transpose(1, 2), turned.transpose(1, 2), v, k_cache, v_cache, is_causal=causal
    )  # fmt: skip
    found = attention_with_kvcache(
        q, k_cache, v_cache, k, v, cos, sin, BEFORE, causal=causal, rotary_interleaved=interleaved
    )  # fmt: skip
    torch.testing.assert_close(found, output)
    torch.testing.assert_close(k_cache, keys)


def test_rotary_of_no_elements():
    q, k, v, k_cache, v_cache = inputs()
    others, none = [t.clone() for t in (k_cache, v_cache)], torch.zeros(SIZE, 0)
    found = attention_with_kvcache(q, k_cache, v_cache, k, v, none, none, BEFORE)
    assert torch.equal(found, attention_with_kvcache(q, *others, k, v, cache_seqlens=BEFORE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8(dtype):
    q, k, v, _, _ = inputs(new=SIZE, dtype=dtype)
    caches = [torch.zeros(B, SIZE, HKV, w, dtype=torch.int8) for w in (D, DV)]
    scales = [torch.zeros(B, SIZE, HKV) for _ in range(2)]
    empty = torch.zeros(B, dtype=torch.int64)
    found = attention_with_kvcache(q, *caches, k, v, cache_seqlens=empty, k_scale=scales[0], v_scale=scales[1])
    for x, cache, scale in zip((k, v), caches, scales, strict=True):
        assert torch.equal(scale, x.float().abs().amax(-1) / 127)
        assert (cache * scale[..., None] - x.float()).abs().max() <= 0.51 * scale.max()
        assert cache.abs().amax(-1).min() == 127
    read = [(c * s[..., None]).to(dtype) for c, s in zip(caches, scales, strict=True)]
    full = torch.full((B,), SIZE)
    torch.testing.assert_close(found, expected(q, None, None, *read, before=full)[0])
    *pools, table = paged(*caches)
    spread = [torch.full((pools[0].size(0), PAGE, HKV), torch.nan) for _ in range(2)]
    again = attention_with_kvcache(
        q, *pools, k, v, cache_seqlens=empty, block_table=table, k_scale=spread[0], v_scale=spread[1]
    )  # fmt: skip
    assert torch.equal(found, again)
    assert torch.equal(
        _read(pools[0], spread[0], table, SIZE, torch.float32).transpose(1, 2), caches[0] * scales[0][..., None]
    )


def test_int8_of_zeros_and_of_infinities():
    k = torch.zeros(1, 2, 1, 8)
    k[0, 1, 0, 3] = torch.inf
    cache, scale = torch.zeros(1, 4, 1, 8, dtype=torch.int8), torch.zeros(1, 4, 1)
    arguments = {"cache_seqlens": 0, "k_scale": scale, "v_scale": scale.clone()}
    output = attention_with_kvcache(torch.ones(1, 1, 1, 8), cache, cache.clone(), k, k, **arguments)
    assert scale[0, 0, 0] == 1 and scale[0, 1, 0].isnan() and output.isnan().all()


def test_without_new_keys_and_without_lengths():
    q, _, _, k_cache, v_cache = inputs()
    before = k_cache.clone()
    full = torch.full((B,), SIZE)
    torch.testing.assert_close(
        attention_with_kvcache(q, k_cache, v_cache), expected(q, None, None, k_cache, v_cache, before=full)[0]
    )
    torch.testing.assert_close(
        attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=7),
        expected(q, None, None, k_cache, v_cache, before=torch.full((B,), 7))[0],
    )
    assert torch.equal(k_cache, before)
    assert attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=0).abs().max() == 0


def test_token_by_token_is_all_at_once(isa):
    q, k, v, _, _ = inputs(new=20, queries=20)
    whole = scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, enable_gqa=True)
    caches = torch.full((B, SIZE, HKV, D), torch.nan), torch.full((B, SIZE, HKV, DV), torch.nan)
    for start, end in ((0, 7), (7, 8), (8, 9), (9, 20)):
        new = (t[:, start:end] for t in (k, v))
        found = attention_with_kvcache(q[:, start:end], *caches, *new, cache_seqlens=start, causal=True)
        torch.testing.assert_close(found, whole.transpose(1, 2)[:, start:end])


def test_the_backends_agree():
    q, k, v, k_cache, v_cache = inputs()
    results = []
    for name in ("cpu", "reference"):
        with backend.use(name):
            results.append(attention_with_kvcache(q, k_cache.clone(), v_cache.clone(), k, v, cache_seqlens=BEFORE))
    torch.testing.assert_close(*results)


def test_opcheck_and_compile():
    q, k, v, k_cache, v_cache = inputs()
    rest = (BEFORE, None, None, None, None, None, -1, 0, 0.0, 0.25, True)
    opcheck(torch.ops.llmkern.attention_kvcache, (q, k_cache.clone(), v_cache.clone(), k, v, None, None, *rest))
    first, second = (k_cache.clone(), v_cache.clone()), (k_cache.clone(), v_cache.clone())
    compiled = torch.compile(attention_with_kvcache, fullgraph=True, backend="aot_eager")
    found = compiled(q, *first, k, v, cache_seqlens=BEFORE, causal=True)
    assert torch.equal(found, attention_with_kvcache(q, *second, k, v, cache_seqlens=BEFORE, causal=True))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_caches_that_overlap_are_not_written_to(name):
    q, k, v, k_cache, _ = inputs()
    v = torch.randn(B, 3, HKV, D)
    both = torch.zeros(B, SIZE, HKV, 2 * D)
    with backend.use(name):
        for wrong, caches in (
            ("k_cache", (k_cache[:, :, :1].expand(-1, -1, HKV, -1), k_cache.clone())),
            ("v_cache", (k_cache, k_cache)),
            ("v_cache", (both[..., :D], both[..., 1 : D + 1])),
        ):
            with pytest.raises(ValueError, match=f"^{wrong}: expected"):
                attention_with_kvcache(q, *caches, k, v, cache_seqlens=BEFORE)
            attention_with_kvcache(q, *caches, cache_seqlens=BEFORE)
        attention_with_kvcache(q, both[..., :D], both[..., D:], k, v, cache_seqlens=BEFORE)


def test_there_is_no_gradient():
    q, k, v, k_cache, v_cache = inputs()
    with pytest.raises(RuntimeError, match="has no gradient: call it under"):
        attention_with_kvcache(q.requires_grad_(), k_cache, v_cache, k, v, cache_seqlens=BEFORE)
    with torch.no_grad():
        attention_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=BEFORE)


def t(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


TABLES = {"rotary_cos": t(24, 4), "rotary_sin": t(24, 4)}
SCALES = {"k_scale": t(B, SIZE, HKV), "v_scale": t(B, SIZE, HKV)}
BAD = {
    "rank": ({"q": t(B, H, D)}, ValueError, ["q:", "(B, Sq, H, D)"]),
    "no tensor": ({"q": 1}, TypeError, ["q:", "torch.Tensor", "int"]),
    "dtype": ({"q": t(B, 3, H, D).double()}, TypeError, ["q:", "float64"]),
    "cache dtype": ({"k_cache": t(B, SIZE, HKV, D).half()}, TypeError, ["k_cache", "float32", "float16"]),
    "cache width": ({"k_cache": t(B, SIZE, HKV, 8)}, ValueError, ["k_cache", f"D = {D}", f"({B}, {SIZE}, {HKV}, 8)"]),
    "cache heads": ({"k_cache": t(B, SIZE, 3, D)}, ValueError, ["k_cache", "divisor of H = 4"]),
    "values": ({"v_cache": t(B, 9, HKV, DV)}, ValueError, ["v_cache", "as in k_cache", "9"]),
    "no value": ({"v": None}, ValueError, ["v:", "since k is given"]),
    "new shape": ({"k": t(B, 3, 1, D)}, ValueError, ["k:", "(B, Sn, Hkv, D)", "(3, 3, 1, 16)"]),
    "no lengths": ({"cache_seqlens": None}, ValueError, ["cache_seqlens", "k and v are written"]),
    "lengths dtype": ({"cache_seqlens": t(B)}, TypeError, ["cache_seqlens", "int32 or int64", "float32"]),
    "lengths shape": ({"cache_seqlens": torch.zeros(2, dtype=torch.int64)}, ValueError, ["cache_seqlens", "(2,)"]),
    "full": ({"cache_seqlens": 22}, ValueError, ["cache_seqlens", "[0, 21]", "24 places", "got 22"]),
    "negative": ({"cache_seqlens": -1}, ValueError, ["cache_seqlens", "got -1"]),
    "table dtype": ({"block_table": t(B, 6)}, TypeError, ["block_table", "int32 or int64"]),
    "table shape": ({"block_table": t(2, 6).long()}, ValueError, ["block_table", "(B, P)", "(2, 6)"]),
    "pages": ({"block_table": t(B, 6).long() - 1}, ValueError, ["block_table", "[0, 3)", "got -1"]),
    "one table": ({"rotary_cos": t(24, 4)}, ValueError, ["rotary_sin", "since rotary_cos is given"]),
    "tables without k": ({"k": None, "v": None, **TABLES}, ValueError, ["rotary_cos", "None without k"]),
    "wide tables": ({"rotary_cos": t(24, 9), "rotary_sin": t(24, 9)}, ValueError, ["rotary_cos", "R <= D = 16"]),
    "short tables": ({"rotary_cos": t(9, 4), "rotary_sin": t(9, 4)}, ValueError, ["rotary_cos", "position 19"]),
    "tables dtype": ({"rotary_cos": t(9, 4).half(), "rotary_sin": t(9, 4)}, TypeError, ["rotary_cos", "float16"]),
    "one scale": ({"k_scale": t(B, SIZE, HKV)}, ValueError, ["v_scale", "since k_scale is given"]),
    "scales without int8": (SCALES, TypeError, ["k_cache", "int8", "float32"]),
    **{
        f"{name} no tensor": ({name: [1.0]}, TypeError, [f"{name}: expected a torch.Tensor, got list"])
        for name in ("k_cache", "v_cache", "k", "v", "cache_seqlens", "block_table", "alibi_slopes", "learnable_sink")
    },
    "k no tensor but an integer": ({"k": 3}, TypeError, ["k: expected a torch.Tensor, got int"]),
    "no scales": ({"k_scale": [1], "v_scale": [1]}, TypeError, ["k_scale: expected a torch.Tensor, got list"]),
    "no tables": ({"rotary_cos": [1], "rotary_sin": [1]}, TypeError, ["rotary_cos: expected a torch.Tensor, got list"]),
    "sparse": ({"v_cache": t(B, SIZE, HKV, DV).to_sparse()}, TypeError, ["v_cache: expected a dense", "sparse_coo"]),
    **{
        f"{flag} no flag": ({flag: "a"}, TypeError, [f"{flag}: expected True or False, got 'a'"])
        for flag in ("causal", "rotary_interleaved", "return_softmax_lse")
    },
    **{
        f"{name} {value}": ({name: value}, TypeError, [f"{name}: expected a number, got {value!r}"])
        for name, value in (("softmax_scale", "a"), ("softmax_scale", [1.0]), ("softcap", "a"), ("softcap", None))
    },
    "scale NaN": ({"softmax_scale": float("nan")}, ValueError, ["softmax_scale", "finite number", "nan"]),
    "scale too large": ({"softmax_scale": 10**400}, ValueError, ["softmax_scale", "finite number", "1329 bits"]),
    "a number for q": ({"q": t(), "cache_seqlens": 1}, ValueError, ["q:", "(B, Sq, H, D)", "()"]),
    "a length that is a flag": ({"cache_seqlens": True}, TypeError, ["cache_seqlens", "integer", "True"]),
    "a length of 71 bits": ({"cache_seqlens": 2**70}, ValueError, ["cache_seqlens", "64 bits", str(2**70)]),
    "window": ({"window_size": (1,)}, ValueError, ["window_size", "(left, right)"]),
    "softcap": ({"softcap": -2.0}, ValueError, ["softcap", "-2.0"]),
    "sink": ({"learnable_sink": t(3)}, ValueError, ["learnable_sink", "(H,) = (4,)"]),
}  # fmt: skip


@pytest.mark.parametrize(("changed", "error", "words"), BAD.values(), ids=BAD)
def test_bad_inputs(changed, error, words):
    arguments = {
        "q": t(B, 3, H, D), "k_cache": t(B, SIZE, HKV, D), "v_cache": t(B, SIZE, HKV, DV), "k": t(B, 3, HKV, D),
        "v": t(B, 3, HKV, DV), "cache_seqlens": BEFORE, **changed,
    }  # fmt: skip
    with pytest.raises(error) as raised:
        attention_with_kvcache(**arguments)
    assert all(word in str(raised.value) for word in words), str(raised.value)
