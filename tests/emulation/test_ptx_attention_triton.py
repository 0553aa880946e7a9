"""The PTX that Triton makes of its attention kernels, through the operator and against the reference."""

from __future__ import annotations

import pytest
import torch

from llmkern import backend, triton
from llmkern.attention import op, reference, triton_launch
from llmkern.attention.mask import Mask
from llmkern.attention.triton_configurations import Configuration
from llmkern.verify import verify
from tests.attention.cases import attend, rule, tensors
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


def compare(monkeypatch, shape, dtype, rules, capability=80, tile=None, gradients=False, **options):
    run = Emulated(capability)
    serve(monkeypatch, run, f"sm_{capability}", tile)
    functions = (attend(plain=plain, **options) for plain in (False, True))
    report = verify(*functions, tensors(shape, dtype), rules, gradients=gradients)
    assert report, str(report)
    return run


@pytest.mark.parametrize("capability", [80, 90])
def test_the_forward_as_it_would_be_launched(capability, monkeypatch):
    """With the configuration of the table: tails of queries and keys, and matrix instructions of the architecture."""
    run = compare(
        monkeypatch, (1, 2, 1, 150, 141, 64, 64), torch.bfloat16, {"causal": True}, capability, logsumexp=True
    )  # fmt: skip
    assert ("wgmma.mma_async" if capability == 90 else "mma.sync.aligned.m16n8k16") in run.ptx[0]
    assert ("cp.async.bulk.tensor.4d" if capability == 90 else "cp.async.cg") in run.ptx[0]


@pytest.mark.parametrize("capability", [80, 90])
def test_the_gradients_as_they_would_be_launched(capability, monkeypatch):
    shape = (1, 2, 1, 70, 140, 64, 64)
    rules = {"causal": True, "bottom_right": True}
    run = compare(monkeypatch, shape, torch.float16, rules, capability, gradients=True)
    assert [name for _, name in run.launched] == [
        "attention_forward_kernel", "attention_statistics_kernel", "attention_backward_query_kernel",
        "attention_backward_key_kernel",
    ]  # fmt: skip
    assert ("wgmma.mma_async" if capability == 90 else "mma.sync.aligned.m16n8k16") in run.ptx[2]


@pytest.mark.parametrize(("name", "shape"), [
    ("window, bottom right", (1, 2, 1, 70, 150, 24, 40)), ("lengths", (2, 1, 1, 65, 130, 64, 64)),
])  # fmt: skip
def test_descriptors(name, shape, monkeypatch):
    """Copies by the tensor memory accelerator: tails, widths between, tiles at both edges and within."""
    dtype = torch.bfloat16
    run = compare(
        monkeypatch, shape, dtype, rule(name, shape, dtype), 90, Configuration(64, 64, 4, 2), gradients=True
    )  # fmt: skip
    assert ["cp.async.bulk.tensor.4d" in ptx for ptx in run.ptx] == [True, False, True, True]


@pytest.mark.parametrize("name", ["everything, additive", "rows"])
def test_rules(name, monkeypatch):
    """Widths that are filled up, grouped heads, empty rows, and gradients."""
    shape, dtype = (2, 2, 1, 37, 50, 24, 40), torch.bfloat16 if name == "rows" else torch.float16
    compare(monkeypatch, shape, dtype, rule(name, shape, dtype), tile=SMALL, gradients=True)


def test_float32_by_three_products_of_tf32(monkeypatch):
    shape = (1, 1, 1, 37, 50, 32, 32)
    run = compare(monkeypatch, shape, torch.float32, {"causal": True}, tile=SMALL, gradients=True, logsumexp=True)
    assert "tf32" in run.ptx[0]


def test_what_is_masked_has_no_part(monkeypatch):
    serve(monkeypatch, Emulated(), tile=SMALL)
    q, k, v = tensors((1, 1, 1, 20, 40, 16, 16), torch.float16)
    expected = op.attention(q, k, v, Mask(window_right=0), 0.25)[0]
    v[:, :, 20:], k[:, :, 25:] = torch.inf, torch.nan
    torch.testing.assert_close(op.attention(q, k, v, Mask(window_right=0), 0.25)[0], expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if s != "lockstep"])
def test_the_same_bits_under_every_schedule(schedule, monkeypatch):
    """Of results and gradients: nothing is added in an order that is left to chance."""
    inputs = tensors((1, 2, 1, 40, 70, 32, 32), torch.bfloat16)
    grad, results = torch.randn(1, 2, 40, 32).bfloat16(), []
    for order in ("lockstep", schedule):
        serve(monkeypatch, Emulated(schedule=order), tile=SMALL)
        leaves = [t.clone().requires_grad_() for t in inputs]
        output, _ = op.attention(*leaves, Mask(window_right=0, bottom_right=True), 0.125)
        results.append([output, *torch.autograd.grad(output, leaves, grad)])
    assert all(map(torch.equal, *results))


FAULTS = {
    "a row behind the last stored": ({"queries": 1}, "out of bounds|uninitialised|read"),
    "keys behind the last read": ({"keys": 1}, "out of bounds|uninitialised|read"),
}


@pytest.mark.parametrize("change", FAULTS)
def test_planted_faults_are_found(change, monkeypatch):
    """The launcher tells the kernel of one query or key more than there are."""
    more, words = FAULTS[change]
    run = Emulated()
    run.more = more
    serve(monkeypatch, run, tile=SMALL)
    with pytest.raises(EmulationError, match=words):
        op.attention(*tensors((1, 1, 1, 33, 40, 32, 32), torch.float16), Mask(), 0.125)


def test_a_planted_error_is_found(monkeypatch):
    """The diagonal, forgotten by the kernel."""
    run = Emulated()
    run.changed = {"RIGHT": False}
    serve(monkeypatch, run, tile=SMALL)
    functions = (attend(plain=plain) for plain in (False, True))
    assert not verify(*functions, tensors((1, 1, 1, 33, 40, 32, 32), torch.float16), {"causal": True}, gradients=False)


def test_the_launcher_names_the_kernels_arguments():
    """In their order, which the launcher gives by place."""
    launches = list(triton_launch.examples("sm_80", torch.bfloat16, 64))
    for launch in launches:
        names = [n for n in triton.function(launch).arg_names if n not in launch.constants]
        assert len(names) == len(launch.arguments) and set(launch.written) <= set(names)
    assert len(launches) == 4


@pytest.mark.parametrize("capability", [80, 90])
def test_tiles_of_scores_that_are_minus_infinity(capability, monkeypatch):
    query, key, value = (torch.rand(1, 1, s, 16).bfloat16() + 0.1 for s in (20, 160, 160))
    key[0, 0, :130, 3] = -torch.inf
    serve(monkeypatch, Emulated(capability), f"sm_{capability}")
    expected = reference.attention(query, key, value, *Mask().arguments(), 0.25, False)[0]
    torch.testing.assert_close(op.attention(query, key, value, Mask(), 0.25)[0], expected, rtol=0.02, atol=0.01)
