"""The attention forward's PTX, of csrc/attention/cuda_forward.cu, through the operator and against the reference."""

from __future__ import annotations

import pytest
import torch

from llmkern import backend, extension
from llmkern.attention import op, reference
from llmkern.attention.mask import Mask
from llmkern.verify import verify
from tests.attention.cases import FEATURES, RULES, attend, rule, tensors
from tests.emulation import compilers
from tests.emulation.attention_on_ptx import ForwardOnEmulator, serve_forward
from tests.emulation.ptx.launch import EmulationError
from tests.emulation.ptx.machine import SCHEDULES

pytestmark = [
    pytest.mark.skipif(compilers.NVCC is None, reason=compilers.NO_NVCC),
    pytest.mark.skipif(extension.MISSING is not None, reason="the plans are those of the library"),
]
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
# (B, H, Hkv, Sq, Sk, D, Dv)
SHAPES = {
    "one of everything": (1, 1, 1, 1, 1, 1, 1),
    "head 64": (1, 2, 2, 64, 64, 64, 64),
    "head 128, tails": (1, 1, 1, 129, 65, 128, 128),
    "head 128, few rows": (1, 2, 1, 20, 70, 128, 128),
    "primes": (1, 3, 3, 67, 131, 17, 23),
    "grouped heads": (2, 6, 2, 33, 70, 40, 40),
    "one query, many keys": (1, 4, 1, 1, 150, 64, 64),
    "wider value": (1, 2, 1, 20, 21, 56, 96),
    "wider head": (1, 1, 1, 19, 50, 104, 8),
    "keys aligned alone": (1, 2, 1, 20, 40, 24, 13),
    "values aligned alone": (1, 2, 1, 20, 40, 13, 24),
    "no keys": (1, 2, 2, 3, 0, 16, 16),
    "no queries": (1, 2, 2, 0, 5, 16, 16),
    "no batch": (0, 2, 1, 3, 5, 16, 16),
    "no width": (1, 4, 2, 33, 40, 0, 16),
    "no value width": (1, 4, 2, 33, 40, 16, 0),
}


@pytest.fixture(autouse=True)
def plans():
    yield
    backend.forget_plans()


def compare(monkeypatch, shape, dtype, rules, uniform=False, **options):
    kernel = serve_forward(monkeypatch, ForwardOnEmulator(**options))
    functions = (attend(uniform, plain, logsumexp=True) for plain in (False, True))
    report = verify(*functions, tensors(shape, dtype), rules, gradients=False)
    assert report, str(report)
    return kernel


@HALVES
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape, dtype, monkeypatch):
    compare(monkeypatch, shape, dtype, {})


@pytest.mark.parametrize("name", [*RULES[1:], *FEATURES])
def test_rules(name, monkeypatch):
    """With fewer keys than queries too, where rows stay empty; both dtypes, zeros and averages take turns."""
    at = [*RULES, *FEATURES].index(name)
    dtype = (torch.bfloat16, torch.float16)[at % 2]
    uniform = at // 2 % 2 == 0 and "dropout_p" not in rule(name, (1, 1, 1, 1, 1, 1, 1))
    compare(monkeypatch, (2, 2, 1, 70, 131, 40, 24), dtype, rule(name, (2, 2, 1, 70, 131, 40, 24), dtype), uniform)
    compare(monkeypatch, (2, 1, 1, 66, 29, 24, 72), dtype, rule(name, (2, 1, 1, 66, 29, 24, 72), dtype), uniform)


def test_empty_rows_are_zeros_or_averages(monkeypatch):
    for uniform in (False, True):
        for name in ("lengths", "rows"):
            shape = (3, 2, 1, 9, 70, 16, 16)
            compare(monkeypatch, shape, torch.float16, rule(name, shape), uniform)


def test_averages_that_are_not_finite(monkeypatch):
    """Rows without keys take the average of all values, column by column."""
    serve_forward(monkeypatch, ForwardOnEmulator())
    q, k, v = tensors((1, 2, 1, 20, 37, 16, 16), torch.float16)
    v[0, 0, 3, 5], v[0, 0, 30, 9] = torch.inf, torch.nan
    for mask in (Mask(torch.zeros(1, 1, 20, 37, dtype=torch.bool)), Mask(key_lengths=torch.tensor([0]))):
        got = op.attention(q, k, v, mask, 0.25, True)[0]
        expected = reference.attention(q, k, v, *mask.arguments(), 0.25, True)[0]
        assert got[..., 5].isposinf().all() and got[..., 9].isnan().all()
        torch.testing.assert_close(got.nan_to_num(), expected.nan_to_num(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("scale", [-0.5, 0.0, 3.0])
def test_scales(scale, monkeypatch):
    serve_forward(monkeypatch, ForwardOnEmulator())
    inputs, mask = tensors((1, 1, 1, 33, 40, 16, 16), torch.bfloat16), Mask(window_right=0)
    truth = reference.attention(*(t.double() for t in inputs), *mask.arguments(), scale, False)[0]
    got = op.attention(*inputs, mask, scale)[0]
    assert (got - truth).abs().max() <= 2**-7 * truth.abs().max()


@HALVES
def test_masked_values_have_no_part(dtype, monkeypatch):
    """Neither behind the lengths, nor past the diagonal within a block of keys, nor by a dense mask."""
    serve_forward(monkeypatch, ForwardOnEmulator())
    q, k, v = tensors((2, 2, 1, 40, 70, 64, 64), dtype)
    lengths, boolean = torch.tensor([70, 33]), torch.rand(2, 1, 40, 70) > 0.5
    broken = v.clone()
    broken[0, 0, 20, 3], broken[0, 0, 35, 5], broken[1, 0, 10, 0] = torch.nan, torch.inf, -torch.inf
    broken[1, :, 33:] = torch.nan
    k[1, :, 33:] = torch.inf
    boolean[:, :, :7, [10, 20, 35]] = False
    for mask in (Mask(window_right=0, key_lengths=lengths), Mask(boolean, lengths)):
        plain, clean = (op.attention(q, k, x, mask, 0.125)[0] for x in (broken, torch.where(broken == v, v, 0)))
        expected = reference.attention(q, k, broken, *mask.arguments(), 0.125, False)[0]
        for same in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(same(plain), same(expected))
        assert plain[:, :, :7].isfinite().all() and not plain.isfinite().all()
        torch.testing.assert_close(plain.isfinite() * clean, plain.nan_to_num(0, 0, 0), rtol=1e-2, atol=4e-3)


def test_strides_and_misaligned_addresses(monkeypatch):
    serve_forward(monkeypatch, ForwardOnEmulator())
    shape = (2, 2, 2, 35, 67, 32, 32)
    q, k, v = tensors(shape, torch.bfloat16)
    expected = op.attention(q, k, v, Mask(), 0.2)[0]
    layouts = {
        "tokens first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "off by an element": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t),
        "rows apart": lambda t: torch.cat([t, t[..., :5]], -1)[..., :32],
        "last dimension apart": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        "half of a wider head": lambda t: torch.cat([t, t], -1)[..., 32:],
    }
    for name, layout in layouts.items():
        got, _ = op.attention(*map(layout, (q, k, v)), Mask(), 0.2)
        assert torch.equal(got, expected), name
    same = k[:1, :1].expand(2, 2, 67, 32)
    got, _ = op.attention(q, same, same, Mask(), 0.2)
    assert torch.equal(got, op.attention(q, same.contiguous(), same.contiguous(), Mask(), 0.2)[0])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_same_bits_under_every_schedule(schedule, monkeypatch):
    q, k, v = tensors((1, 2, 1, 70, 140, 64, 64), torch.bfloat16)
    results = []
    for order in ("lockstep", schedule):
        serve_forward(monkeypatch, ForwardOnEmulator(schedule=order))
        results.append(op.attention(q, k, v, Mask(window_left=90, window_right=0, bottom_right=True), 0.125))
    assert all(map(torch.equal, *results))


def test_on_hopper_the_launcher_takes_wgmma_where_it_can(monkeypatch):
    kernel = serve_forward(monkeypatch, ForwardOnEmulator(), hopper=True)
    q, k, v = tensors((1, 2, 1, 20, 30, 64, 64), torch.float16)
    for softcap, name in ((0.0, "attention_sm90_kernel"), (2.0, "attention_forward_kernel")):
        got = op.attention(q, k, v, Mask(softcap=softcap), 0.125)[0]
        assert [name in launched for launched, _ in kernel.reports] == [True]
        kernel.reports.clear()
        expected = reference.attention(q, k, v, *Mask(softcap=softcap).arguments(), 0.125, False)[0]
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("width", [64, 128])
def test_counts(width, features, monkeypatch):
    """No bank conflicts, no piece of less than 16 bytes, and no products but those needed."""
    rows = 64 if features else 128  # two tiles of rows for a warp without
    q, k, v = tensors((1, 1, 1, rows, 192, width, width), torch.bfloat16)
    kernel = serve_forward(monkeypatch, ForwardOnEmulator(counts=True))
    op.attention(q, k, v, Mask(softcap=float(features)), 0.125)
    counts = kernel.reports[-1][1].counts
    products = 2 * rows * 192 * width // (16 * 8 * 16)
    assert counts.matrix == {"mma.m16n8k16.f32.bf16.bf16.f32": products}
    assert counts.conflicts == 0
    for site in counts.sites:
        if site.space == "global" and ".f64" not in site.text:
            assert site.bytes == 16 * 32 * site.requests and site.units == site.fewest, site
    # A warp of 16 or 32 rows takes the tiles of keys that some of its rows see: here that of the diagonal.
    tiles = 192 // (32 if width == 128 and not features else 64)
    op.attention(q, k, v, Mask(window_left=0, window_right=0, softcap=float(features)), 0.125)
    assert kernel.reports[-1][1].counts.matrix == {"mma.m16n8k16.f32.bf16.bf16.f32": products // tiles}


FAULTS = {
    "the values' copies not waited for": ("      wait_for_copies<0>();\n      __syncthreads();\n      if (key + kKeys",
                                          "      __syncthreads();\n      if (key + kKeys"),
    "keys overwritten while others read": ("      wait_for_copies<0>();\n      __syncthreads();\n      if (key + kKeys",
                                           "      wait_for_copies<0>();\n      if (key + kKeys"),
    "values overwritten while others read": ("      wait_for_copies<0>();\n      __syncthreads();\n      load<kKeys>(v",
                                             "      wait_for_copies<0>();\n      load<kKeys>(v"),
    "a row behind the last written": ("first + r + i >= rules.queries ||", "first + r + i > rules.queries ||"),
    "keys behind the last read": ("key, rules.limits.keys, static_cast<int>(p.width)",
                                  "key, rules.limits.keys + 1, static_cast<int>(p.width)"),
}  # fmt: skip
WRONG = {
    "one key too many": ("if (seen == Seen::some) limit_scores", "if (false) limit_scores"),
    "sums not made relative to the new largest": ("fmaf(sum[t][half], kept, added)", "sum[t][half] + added"),
    "values of other keys": ("step * 16 * kRowBytes);\n#pragma unroll\n        for (int t = 0; t < kTiles; t++) {\n "
                             "         multiply(output", "0);\n#pragma unroll\n        for (int t = 0; t < kTiles; "
                             "t++) {\n          multiply(output"),
    "the largest of two lanes alone": ("fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2))", "most"),
}  # fmt: skip


#: No other kernel than this is compiled, which takes most of the time.
ONE = ("p.dtype == DType::bf16 ? forward_of<Bf16>(p, l, device, stream) : forward_of<Fp16>(p, l, device, stream);",
       "launch_forward<Bf16, 64, 2, false>(p, l, device, stream);")  # fmt: skip
PLANTED = (1, 1, 1, 70, 130, 64, 64)


@pytest.mark.parametrize("change", FAULTS.values(), ids=FAULTS)
def test_planted_faults_are_found(change, monkeypatch):
    serve_forward(monkeypatch, ForwardOnEmulator(changes=(ONE, change)))
    with pytest.raises(EmulationError):
        op.attention(*tensors(PLANTED, torch.bfloat16), Mask(), 0.125)


@pytest.mark.parametrize("change", [None, *WRONG.values()], ids=["none", *WRONG])
def test_planted_errors_are_found(change, monkeypatch):
    serve_forward(monkeypatch, ForwardOnEmulator(changes=(ONE, change) if change else (ONE,)))
    inputs, mask = tensors(PLANTED, torch.bfloat16), Mask()
    run = lambda *x: reference.attention(*x, *mask.arguments(), 0.125, False)[0]  # noqa: E731
    truth = run(*(t.double() for t in inputs))
    got, plain = op.attention(*inputs, mask, 0.125)[0], run(*inputs)
    assert ((got - truth).abs().max() > 2 * (plain - truth).abs().max()) == bool(change)
