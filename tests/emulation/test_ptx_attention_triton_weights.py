"""The PTX that Triton makes of its attention weights and column sums, by the operators and against the reference."""

from __future__ import annotations

import pytest
import torch

from llmkern import backend, triton
from llmkern.attention import triton_weights_launch
from llmkern.attention.triton_configurations import Configuration
from llmkern.verify import verify
from tests.attention.cases import rule, tensors
from tests.attention.on_triton import serve
from tests.attention.weights_cases import column_sums, weights

pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux)")
from tests.emulation.ptx.launch import EmulationError
from tests.emulation.triton_on_ptx import Emulated

SMALL = Configuration(32, 32, 4, 2)  # compiles and runs sooner than what a GPU would have
KERNELS = {"attention_weights_kernel": weights, "attention_column_sums_kernel": column_sums}


@pytest.fixture(autouse=True)
def plans():
    yield
    backend.forget_plans()


def without_values(monkeypatch, run, family, tile=None):
    """The log-sum-exps come from the CPU: only the kernels under test are emulated."""
    operator = backend.Operator.all["attention"]
    kept = operator.by_device
    serve(monkeypatch, run, family, tile)
    monkeypatch.setattr(operator, "by_device", kept)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kernel", KERNELS)
def test_as_they_would_be_launched(kernel, capability, monkeypatch):
    """With the configurations of the table; rows of weights that are whole pieces of 16 bytes are stored so."""
    run = Emulated(capability)
    without_values(monkeypatch, run, f"sm_{capability}")
    inputs = tensors((1, 2, 1, 140, 144, 64, 1), torch.bfloat16)[:2]
    functions = (KERNELS[kernel](plain=plain) for plain in (False, True))
    verify(*functions, inputs, {"causal": True, "bottom_right": True}, gradients=False).raise_if_failed()
    assert [name for _, name in run.launched] == [kernel]
    assert ("wgmma.mma_async" if capability == 90 else "mma.sync.aligned.m16n8k16") in run.ptx[0]
    assert "cp.async.cg.shared.global" in run.ptx[0]
    assert "st.global.v4" in run.ptx[0] or kernel != "attention_weights_kernel"


@pytest.mark.parametrize("capability", [80, 90])
def test_gradients(capability, monkeypatch):
    """Of query and key, with grouped heads, odd lengths and hidden keys."""
    run = Emulated(capability)
    without_values(monkeypatch, run, f"sm_{capability}", SMALL)
    shape = (1, 2, 1, 37, 51, 32, 1)
    functions = (weights(plain=plain) for plain in (False, True))
    rules = {"causal": True, "bottom_right": True}
    verify(*functions, tensors(shape, torch.bfloat16)[:2], rules).raise_if_failed()
    assert [name for _, name in run.launched[:3]] == [
        "attention_weights_kernel", "attention_weights_query_kernel", "attention_weights_key_kernel",
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kernel", KERNELS)
def test_rules(kernel, dtype, monkeypatch):
    """All together, widths that are filled up, odd lengths, grouped heads; rows without keys, averages in one case."""
    without_values(monkeypatch, Emulated(), "sm_80", SMALL)
    uniform = dtype == torch.float32
    shape = (2, 2, 1, 37, 51, 24, 1)
    rules = rule("rows" if uniform else "everything, additive", shape, dtype)
    functions = (KERNELS[kernel](uniform, plain) for plain in (False, True))
    verify(*functions, tensors(shape, dtype)[:2], rules, gradients=False).raise_if_failed()


@pytest.mark.parametrize("more", [{"queries": 1}, {"keys": 1}], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_planted_faults_are_found(kernel, more, monkeypatch):
    """The launcher tells the kernel of one query or key more than there are."""
    run = Emulated()
    run.more = more
    without_values(monkeypatch, run, "sm_80", SMALL)
    with pytest.raises(EmulationError):
        KERNELS[kernel]()(*tensors((1, 1, 1, 33, 40, 32, 1), torch.float16)[:2])


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_planted_error_is_found(kernel, monkeypatch):
    """The diagonal, forgotten by the kernel."""
    run = Emulated()
    run.changed = {"RIGHT": False}
    without_values(monkeypatch, run, "sm_80", SMALL)
    functions = (KERNELS[kernel](plain=plain) for plain in (False, True))
    inputs = tensors((1, 1, 1, 33, 40, 32, 1), torch.float16)[:2]
    assert not verify(*functions, inputs, {"causal": True}, gradients=False)


def test_the_launchers_name_the_kernels_arguments():
    """In their order, which the launchers give by place."""
    launches = list(triton_weights_launch.examples("sm_80", torch.bfloat16, 64))
    for launch in launches:
        names = [n for n in triton.function(launch).arg_names if n not in launch.constants]
        assert len(names) == len(launch.arguments) and set(launch.written) <= set(names)
    assert [x.kernel for x in launches] == [*KERNELS, "attention_weights_query_kernel", "attention_weights_key_kernel"]
