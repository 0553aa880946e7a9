"""The PTX that Triton makes of its attention on a cache, through the operator and against the reference."""

from __future__ import annotations

import pytest
import torch

from llmkern import backend, triton
from llmkern.attention import reference, triton_decode_launch
from llmkern.functional import attention_with_kvcache
from tests.attention.decode_cases import ONE_PIECE, PIECES, check, in_pages, inputs, ours
from tests.attention.decode_on_triton import serve

pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux)")
from tests.emulation.ptx.launch import EmulationError
from tests.emulation.ptx.machine import SCHEDULES
from tests.emulation.triton_on_ptx import Emulated


@pytest.fixture(autouse=True)
def plans():
    yield
    backend.forget_plans()


def emulate(monkeypatch, processors=ONE_PIECE, capability=80, **options):
    run = Emulated(capability, **options)
    serve(monkeypatch, run, processors, f"sm_{capability}")
    return run


@pytest.mark.parametrize("capability", [80, 90])
def test_as_it_would_be_launched(capability, monkeypatch):
    """Two blocks of rows, tails, pieces; matrix instructions and asynchronous copies."""
    run = emulate(monkeypatch, PIECES, capability)
    check(*inputs(1, 3, 7, 1, 64, 64, 333, torch.bfloat16), causal=True)
    assert [name for _, name in run.launched] == ["attention_decode_kernel", "attention_combine_kernel"]
    assert "mma.sync.aligned.m16n8k16" in run.ptx[0] and "cp.async" in run.ptx[0]


@pytest.mark.parametrize("processors", [ONE_PIECE, PIECES])
def test_rules_and_lengths(processors, monkeypatch):
    """The tokens behind the lengths are NaN; one sequence has none, one fewer than there are queries."""
    emulate(monkeypatch, processors)
    q, k_cache, v_cache = inputs(3, 3, 2, 1, 24, 16, 290, torch.float16)
    lengths = torch.tensor([280, 0, 2], dtype=torch.int32)
    for b, length in enumerate(lengths.tolist()):
        k_cache[b, length:], v_cache[b, length:] = torch.nan, torch.nan
    sink, slopes = torch.tensor([0.3, -2.0]), torch.tensor([0.5, 0.1])
    check(
        q, k_cache, v_cache, lengths, None, None, None, slopes, sink, window_size=(150, 1), softcap=1.5
    )  # fmt: skip


@pytest.mark.parametrize(("capability", "processors"), [(80, ONE_PIECE), (90, PIECES)])
def test_float32(capability, processors, monkeypatch):
    """Exact products, without matrix units; pages, a sink, and scores whose exponents are large."""
    run = emulate(monkeypatch, processors, capability)
    q, *caches = inputs(1, 1, 2, 1, 24, 16, 270, torch.float32)
    *pools, table = in_pages(16, *caches)
    check(q * 20, *pools, torch.tensor([261]), table, None, None, None, torch.tensor([0.3, 9.0]))
    assert not any("mma" in ptx.split("// --")[0] for ptx in run.ptx)


@pytest.mark.parametrize("capability", [80, 90])
def test_int8_and_pages(capability, monkeypatch):
    emulate(monkeypatch, ONE_PIECE, capability)
    q, *floats = inputs(2, 1, 4, 1, 64, 72, 70, torch.float16)
    caches = [torch.randint(-128, 128, x.shape, dtype=torch.int8) for x in floats]
    scales = [torch.rand(x.shape[:3]) * 10.0 ** torch.randint(-4, 1, x.shape[:3]) / 64 for x in floats]
    scales[0] = scales[0].clamp(max=0.02)
    *pools, table = in_pages(16, *caches, *scales)
    check(q, *pools[:2], torch.tensor([70, 33]), table, *pools[2:])


def test_what_one_query_does_not_see_does_not_reach_it(monkeypatch):
    emulate(monkeypatch)
    q, k_cache, v_cache = inputs(1, 3, 4, 1, 16, 16, 20, torch.float16)
    expected = ours(q, k_cache, v_cache, causal=True)[0]
    k_cache[:, -1], v_cache[:, -1, :, ::5], v_cache[:, -2, :, 7] = torch.nan, torch.inf, torch.inf
    out = ours(q, k_cache, v_cache, causal=True)[0]
    torch.testing.assert_close(out[:, 0], expected[:, 0], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(out[:, 1, :, 8:], expected[:, 1, :, 8:], rtol=2e-3, atol=2e-3)
    assert not out[:, 1, :, 7].isfinite().any()


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("int8", "pooled", "interleaved"), [(True, True, False), (True, False, True), (False, True, True)]
)
def test_new_tokens(int8, pooled, interleaved, capability, monkeypatch):
    """The very elements, integers and scales of the reference."""
    emulate(monkeypatch, ONE_PIECE, capability)
    q, k, v = inputs(2, 3, 4, 2, 24, 20, 3, torch.bfloat16)
    caches = [torch.full((2, 12, 2, d), 9, dtype=torch.int8 if int8 else torch.bfloat16) for d in (24, 20)]
    scales = [torch.full((2, 12, 2), 0.02) for _ in caches] if int8 else []
    table, lengths = None, torch.tensor([5, 0])
    if pooled:
        *pools, table = in_pages(4, *caches, *scales)
        caches, scales = pools[:2], pools[2:]
    scales, angle = scales or [None, None], torch.rand(12, 10) * 6
    others = [None if t is None else t.clone() for t in (*caches, *scales)]
    cos, sin = angle.cos(), angle.sin()
    out = attention_with_kvcache(
        q, *caches, k, v, cos, sin, lengths, table, None, True, rotary_interleaved=interleaved, k_scale=scales[0],
        v_scale=scales[1],
    )  # fmt: skip
    expected = reference.attention_kvcache(
        q, *others[:2], k, v, cos, sin, lengths, table, *others[2:], None, None, -1, 0, 0.0, 24**-0.5, interleaved
    )[0]  # fmt: skip
    for a, b in zip((*caches, *scales), others, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if s != "lockstep"])
def test_the_same_bits_under_every_schedule(schedule, monkeypatch):
    some, results = inputs(1, 1, 2, 1, 32, 32, 270, torch.float16), []
    for order in ("lockstep", schedule):
        emulate(monkeypatch, PIECES, schedule=order)
        results.append(ours(*some))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("more", [{"capacity": 1}, {"queries": 1}])
def test_planted_faults_are_found(more, monkeypatch):
    """The launcher tells the kernel of one key or query more than there are."""
    run = emulate(monkeypatch)
    run.more = more
    with pytest.raises(EmulationError, match=r"out of bounds|uninitialised"):
        ours(*inputs(1, 3, 2, 1, 32, 32, 40, torch.float16))


def test_a_planted_error_is_found(monkeypatch):
    """The diagonal, forgotten by the kernel."""
    emulate(monkeypatch).changed = {"RIGHT": False}
    with pytest.raises(AssertionError):
        check(*inputs(1, 3, 2, 1, 32, 32, 40, torch.float16), causal=True)


def test_the_launcher_names_the_kernels_arguments():
    """In their order, which the launcher gives by place."""
    launches = list(triton_decode_launch.examples("sm_80", torch.bfloat16, 64, True, True))
    for launch in launches:
        names = [n for n in triton.function(launch).arg_names if n not in launch.constants]
        assert len(names) == len(launch.arguments) and {*launch.written, *launch.changed} <= set(names)
    assert len(launches) == 3
