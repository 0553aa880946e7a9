"""The PTX that Triton makes of its attention of sequences end to end, by the operator and against the reference."""

from __future__ import annotations

import pytest
import torch

from llmkern import backend, triton
from llmkern.attention import triton_varlen_launch
from llmkern.attention.mask import Mask
from llmkern.attention.triton_configurations import Configuration
from llmkern.verify import verify
from tests.attention.on_triton import serve
from tests.attention.varlen_cases import attend, packed, rule, same_bits_as_alone

pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux)")
from tests.emulation.ptx.launch import EmulationError
from tests.emulation.triton_on_ptx import Emulated

SMALL = Configuration(32, 32, 4, 2)  # compiles and runs sooner than what a GPU would have


@pytest.fixture(autouse=True)
def plans():
    yield
    backend.forget_plans()


@pytest.mark.parametrize("capability", [80, 90])
def test_as_it_would_be_launched(capability, monkeypatch):
    """With the configurations of the table: sequences without queries or keys, both ways to delta, and the matrix
    instructions and copies of the architecture."""
    run = Emulated(capability)
    serve(monkeypatch, run, f"sm_{capability}")
    lengths = ([70, 0, 33, 5], [140, 3, 0, 20])
    tensors, bounds = packed(lengths, torch.bfloat16 if capability == 80 else torch.float16, widths=(64, 64))
    mask = Mask(window_right=0)
    verify(*(attend(bounds, mask, plain, scale=0.125) for plain in (False, True)), tensors).raise_if_failed()
    assert [name for _, name in run.launched] == [
        "attention_forward_kernel", "attention_statistics_kernel", "attention_backward_query_kernel",
        "attention_backward_key_kernel",
    ]  # fmt: skip
    for ptx in (run.ptx[0], run.ptx[2]):
        assert ("wgmma.mma_async" if capability == 90 else "mma.sync.aligned.m16n8k16") in ptx
    # Where a sequence begins is not known, and still its rows are read 16 bytes at a time.
    assert "cp.async.cg.shared.global" in run.ptx[0]


def test_rules(monkeypatch):
    """All together, with gradients and log-sum-exps, widths that are filled up, grouped heads."""
    serve(monkeypatch, Emulated(), tile=SMALL)
    tensors, bounds = packed(([37, 20], [50, 31]), torch.bfloat16, (4, 2), (24, 40))
    mask = rule("everything", 4, 2, torch.bfloat16)
    verify(*(attend(bounds, mask, plain, True) for plain in (False, True)), tensors).raise_if_failed()


@pytest.mark.parametrize("capability", [80, 90])
def test_bits_do_not_depend_on_neighbours(capability, monkeypatch):
    """Of outputs, log-sum-exps and gradients: the dense kernels, compiled without bounds, give the same."""
    serve(monkeypatch, Emulated(capability), f"sm_{capability}", SMALL)
    tensors, bounds = packed(([33, 26, 7], [20, 135, 40]), torch.bfloat16, widths=(32, 32), of_bounds=torch.int64)
    same_bits_as_alone(tensors, bounds, Mask(window_right=0, bottom_right=True))


@pytest.mark.parametrize(
    "wrong", [[0, 40, 33], [0, 90, 33], [70, 90, 99], [-3, 20, 10**6], [50, 40, 30], [0, 20, 20]], ids=str
)
def test_bounds_that_are_none_reach_nothing_outside(wrong, monkeypatch):
    """Nothing looks at them before the kernel, which faults neither in the forward nor in the gradients."""
    serve(monkeypatch, Emulated(), tile=SMALL)
    tensors, bounds = packed(([20, 13], [20, 13]), torch.float16, widths=(16, 16))
    bad = torch.tensor(wrong, dtype=torch.int32)
    for of_queries, of_keys in ((bad, bounds[1]), (bounds[0], bad), (bad, bad)):
        leaves = [t.clone().requires_grad_() for t in tensors]
        attend((of_queries, of_keys), Mask(window_right=0))(*leaves).sum().backward()


FAULTS = {
    "a bound too many": ({"sequences": 1}, {}, EmulationError),
    "a query behind the last": ({"queries": 1}, {}, EmulationError),
    "a key behind the last": ({"keys": 1}, {}, EmulationError),
    "the diagonal forgotten": ({}, {"RIGHT": False}, AssertionError),
    "sequences forgotten": ({}, {"PACKED": False}, AssertionError),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault, monkeypatch):
    run = Emulated()
    run.more, run.changed, error = FAULTS[fault]
    serve(monkeypatch, run, tile=SMALL)
    tensors, bounds = packed(([20, 13], [20, 13]), torch.float16, widths=(16, 16))
    functions = [attend(bounds, Mask(window_right=0), plain) for plain in (False, True)]
    with pytest.raises(error):
        if "keys" in run.more:  # which bounds keep the kernels from, as long as they are right
            bounds[1][-1] += 1
            functions[0](*tensors)
        verify(*functions, tensors, gradients=False).raise_if_failed()


def test_the_launcher_names_the_kernels_arguments():
    """In their order, which the launcher gives by place."""
    launches = list(triton_varlen_launch.examples("sm_80", torch.bfloat16, 64))
    for launch in launches:
        names = [n for n in triton.function(launch).arg_names if n not in launch.constants]
        assert len(names) == len(launch.arguments) and set(launch.written) <= set(names)
    assert len(launches) == 4
