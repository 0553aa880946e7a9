"""The PTX that Triton makes of the attention of quantised queries and keys, through the operator and against the plain
version."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from llmkern import backend, triton
from llmkern.attention import op, triton_int8_launch
from llmkern.attention.mask import Mask
from llmkern.attention.reference import int8 as plain_int8
from llmkern.attention.triton_configurations import Configuration
from tests.attention.cases import tensors
from tests.attention.int8_cases import compare, rules_of, shifted
from tests.attention.on_triton import serve

pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux)")
from tests.emulation.ptx.launch import EmulationError
from tests.emulation.ptx.machine import SCHEDULES
from tests.emulation.triton_on_ptx import Emulated

SMALL = Configuration(32, 32, 4, 2)  # compiles and runs sooner than what a GPU would have


@pytest.fixture(autouse=True)
def plans():
    yield
    backend.forget_plans()


def served(monkeypatch, capability=80, tile=SMALL, **options):
    run = Emulated(capability, **options)
    serve(monkeypatch, run, f"sm_{capability}", tile)
    return run


@pytest.mark.parametrize("capability", [80, 90])
def test_as_it_would_be_launched(capability, monkeypatch):
    """With the configuration of the table: tails of queries and keys, and the matrix instructions of integers."""
    run = served(monkeypatch, capability, None)
    compare((1, 2, 1, 150, 141, 64, 64), torch.bfloat16, {"causal": True})
    assert [name for _, name in run.launched] == [
        "attention_key_sums_kernel", "attention_quantize_kernel", "attention_quantize_kernel", "attention_int8_kernel",
    ]  # fmt: skip
    if capability == 90:
        assert "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8" in run.ptx[-1]
    else:
        assert "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32" in run.ptx[-1]
    assert "cp.async" in run.ptx[-1] and "wgmma" not in run.ptx[1]


@pytest.mark.parametrize("capability", [80, 90])
def test_the_integers_are_the_references(capability, monkeypatch):
    """Bit for bit, of keys in two chunks; rows that are not finite, and zeros behind the width."""
    run, found = Emulated(capability), []

    def keep(launch):
        if launch.kernel == "attention_int8_kernel":  # which need not run
            found.extend(launch.arguments[:5])
        else:
            run(launch)

    serve(monkeypatch, keep, f"sm_{capability}", SMALL)
    q, k, v = shifted(tensors((1, 2, 1, 5, 1100, 24, 16), torch.bfloat16))
    k[0, 0, 1050, 3], q[0, 1, 4, 5], q[0, 0, 1] = torch.inf, torch.nan, 0.0
    lengths = torch.tensor([1090])
    op.attention_int8(q, k, v, Mask(key_lengths=lengths), 0.25, True)
    average = plain_int8.key_average(k, lengths)
    expected = (*plain_int8.quantized(q), *plain_int8.quantized(k, average))
    q8, q_scale, _, k8, k_scale = found
    assert torch.equal(q8[..., :24], expected[0]) and torch.equal(k8[..., :24], expected[2])
    assert not q8[..., 24:].any() and not k8[..., 24:].any()
    for got, scale in ((q_scale, expected[1]), (k_scale, expected[3])):
        torch.testing.assert_close(got, scale, rtol=0, atol=0, equal_nan=True)
    assert [name for _, name in run.launched][:2] == ["attention_key_sums_kernel"] * 2


@pytest.mark.parametrize("name", ["everything, additive", "rows", "softcap", "sink"])
def test_rules(name, monkeypatch):
    """Widths that are filled up, grouped heads, empty rows."""
    served(monkeypatch)
    shape, dtype = (2, 2, 1, 37, 50, 24, 40), torch.bfloat16 if name == "rows" else torch.float16
    compare(shape, dtype, rules_of(name, shape, dtype), smooth=name != "rows")


def test_what_is_masked_has_no_part(monkeypatch):
    served(monkeypatch)
    q, k, v = tensors((1, 1, 1, 20, 40, 16, 16), torch.float16)
    k[:, :, 20:] = 0.0  # as what is not finite counts in the average
    expected = op.attention_int8(q, k, v, Mask(window_right=0), 0.25, True)
    v[:, :, 20:], k[:, :, 25:] = torch.inf, torch.nan
    for got, before in zip(op.attention_int8(q, k, v, Mask(window_right=0), 0.25, True), expected, strict=True):
        torch.testing.assert_close(got, before, rtol=2e-3, atol=2e-3)


def test_the_same_bits_under_every_schedule(monkeypatch):
    inputs, results = shifted(tensors((1, 2, 1, 40, 70, 32, 32), torch.bfloat16)), []
    for schedule in SCHEDULES:
        served(monkeypatch, schedule=schedule)
        results.append(op.attention_int8(*inputs, Mask(window_right=0, bottom_right=True), 0.125, True))
    assert all(torch.equal(a, b) for r in results for a, b in zip(r, results[0], strict=True))


@pytest.mark.parametrize("change", [{"queries": 1}, {"keys": 1}, {"rows": 1}])
def test_planted_faults_are_found(change, monkeypatch):
    """The launcher tells a kernel of one query, key or row more than there are."""
    run = served(monkeypatch)
    run.more = change
    with pytest.raises(EmulationError, match=r"out of bounds|uninitialised|read"):
        op.attention_int8(*tensors((1, 1, 1, 33, 40, 32, 32), torch.float16), Mask(), 0.125, True)


@pytest.mark.parametrize("change", [{"RIGHT": False}, {"AVERAGE": False}])
def test_planted_errors_are_found(change, monkeypatch):
    """The diagonal, forgotten; an average that is a sum."""
    run = Emulated()

    def wrong(launch):
        changed = {k: v for k, v in change.items() if k in launch.constants}
        run(dataclasses.replace(launch, constants={**launch.constants, **changed}))

    serve(monkeypatch, wrong, tile=SMALL)
    with pytest.raises(AssertionError):
        compare((1, 1, 1, 5, 33, 32, 32), torch.float16, {"causal": True, "bottom_right": True})


def test_the_launcher_names_the_kernels_arguments():
    """In their order, which the launcher gives by place."""
    launches = list(triton_int8_launch.examples("sm_80", torch.bfloat16, 64))
    for launch in launches:
        names = [n for n in triton.function(launch).arg_names if n not in launch.constants]
        assert len(names) == len(launch.arguments) and set(launch.written) <= set(names)
    assert len(launches) == 5
