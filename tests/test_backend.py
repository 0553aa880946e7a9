"""The choice of a backend: order, reasons, the warning, force by name, and plans that are forgotten in time."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch

from llmkern import backend
from llmkern.backend import Backend, BackendError, Operator, reference_backend


@pytest.fixture
def operator():
    """An operator `double` whose cpu kernel serves float32 alone, and which counts its plans and checks."""
    counts = {"checks": 0, "plans": 0}

    def check(x):
        counts["checks"] += 1
        if x.dim() != 1:
            raise ValueError(f"x: expected (N,), got shape {tuple(x.shape)}")

    def plan(x):
        counts["plans"] += 1
        return lambda x: ("cpu", x * 2)

    def unsupported(x):
        return None if x.dtype == torch.float32 else f"its kernel serves float32, not {x.dtype}"

    made = Operator(
        "double",
        check,
        cpu=[Backend("cpu", plan, unsupported), reference_backend(lambda x: ("reference", x + x))],
        other=[reference_backend(lambda x: ("reference", x + x))],
    )
    made.counts = counts
    yield made
    del Operator.all["double"]


def test_first_backend_that_can_serves_and_its_plan_is_kept(operator):
    for _ in range(3):
        assert operator.run(torch.ones(2))[0] == "cpu"
    assert operator.counts == {"checks": 1, "plans": 1}
    operator.run(torch.ones(4)[::2])  # other strides: another plan
    assert operator.counts == {"checks": 2, "plans": 2}


def test_arguments_are_checked_before_any_backend(operator):
    with pytest.raises(ValueError, match="x: expected"):
        operator.run(torch.ones(2, 2))
    assert operator.counts["plans"] == 0


def test_fallback_to_the_reference_warns_once_with_the_reason(operator):
    with pytest.warns(UserWarning, match="double runs on the plain PyTorch reference .cpu: its kernel serves float32"):
        assert operator.run(torch.ones(2, dtype=torch.float16))[0] == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        operator.run(torch.ones(3, dtype=torch.float16))


def test_a_backend_asked_for_by_name_never_falls_back(operator):
    x = torch.ones(2)
    assert operator.run(x)[0] == "cpu"
    with backend.use("reference"):
        assert operator.run(x)[0] == "reference"
        with backend.use("cpu"):
            assert operator.run(x)[0] == "cpu"
            with pytest.raises(BackendError, match="cpu was asked for by name, but its kernel serves float32"):
                operator.run(x.half())
        assert operator.run(x)[0] == "reference"
    with backend.use("triton"), pytest.raises(BackendError, match="no triton kernel"):
        operator.run(x)
    assert operator.run(x)[0] == "cpu"


def test_a_backend_asked_for_by_name_serves_its_own_device_alone(operator):
    with (
        backend.use("cpu"),
        pytest.raises(BackendError, match="cpu was asked for by name, but the tensors are on meta"),
    ):
        operator.run(torch.ones(2, device="meta"))


def test_unknown_backend_names_the_choices():
    message = "backend: expected one of cpu, cuda, triton, reference, got 'gpu'"
    with pytest.raises(ValueError, match=message), backend.use("gpu"):
        pass
    code = "import llmkern.backend"
    wrong = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "LLMKERN_BACKEND": "gpu"}, capture_output=True, text=True
    )
    message = "ValueError: LLMKERN_BACKEND: expected one of cpu, cuda, triton, reference, got 'gpu'"
    assert wrong.returncode != 0 and wrong.stderr.endswith(f"{message}\n")


def test_plans_do_not_grow_without_bound(operator, monkeypatch):
    monkeypatch.setattr(backend.Plans, "most", 8)
    for n in range(50):
        operator.run(torch.ones(n))
    assert len(operator.plans) <= 8


@pytest.fixture
def on_a_gpu(monkeypatch):
    """An operator `double` with two kernels for a GPU that serve all; its device says which capability it has."""
    device = {"capability": (9, 0)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: device["capability"])

    def kernel(name):
        return Backend(name, lambda x: lambda x: name, lambda x: device.get(name))

    backends = [kernel("cuda"), kernel("triton")]
    made = Operator("double", lambda x: None, cuda=[*backends, reference_backend(lambda x: "reference")], other=[])
    x = type("OnGpu", (), {"device": torch.device("cuda", 0), "shape": (4,)})()
    yield made, x, device
    del Operator.all["double"]


def test_the_table_orders_the_backends_of_a_gpu(on_a_gpu, monkeypatch):
    operator, x, device = on_a_gpu
    assert operator._choose((x,)).name == "cuda"  # nothing in the table: as listed
    lines = [
        backend.Preference("double", (9, 0), (9, 0), "of 4", lambda x: x.shape == (4,), "triton", "because"),
        backend.Preference("double", (8, 0), backend.NEWEST, "any", lambda x: True, "cuda", "because"),
        backend.Preference("other", (8, 0), backend.NEWEST, "any", lambda x: True, "reference", "because"),
    ]
    monkeypatch.setattr(backend, "PREFERENCES", lines)
    assert operator._choose((x,)).name == "triton"
    for capability in ((8, 9), (10, 0), (12, 1)):
        device["capability"] = capability
        assert operator._choose((x,)).name == "cuda"
    device["capability"] = (9, 0)
    device["triton"] = "it is not there"  # the next one serves
    assert operator._choose((x,)).name == "cuda"
    del device["triton"]
    x.shape = (5,)
    assert operator._choose((x,)).name == "cuda"


def test_the_table_gives_way_to_a_name(on_a_gpu, monkeypatch):
    operator, x, _ = on_a_gpu
    line = backend.Preference("double", (8, 0), backend.NEWEST, "any", lambda x: True, "triton", "because")
    monkeypatch.setattr(backend, "PREFERENCES", [line])
    for name in ("cuda", "triton", "reference"):
        with backend.use(name):
            assert operator._choose((x,)).name == name


def test_every_line_of_the_table_is_of_an_operator_and_a_backend_that_there_are():
    import llmkern.functional  # noqa: F401  (all operators are there)

    for line in backend.PREFERENCES:
        listed = [b.name for b in Operator.all[line.operator].by_device["cuda"]]
        assert line.backend in listed and listed.count(line.backend) == 1, line
        assert line.first >= (8, 0) and line.first <= line.last and line.reason and line.shapes
    several = {
        n for n, o in Operator.all.items() if {"cuda", "triton"} <= {b.name for b in o.by_device.get("cuda", [])}
    }
    assert several == {line.operator for line in backend.PREFERENCES}


def test_the_choice_by_architecture_and_shape():
    def chosen(operator, capability, *args):
        return backend.preference(operator, capability, args).backend

    q = torch.empty(1, 4, 8, 128, dtype=torch.bfloat16)
    plain = (None, None, None, None, None, -1, 0, False, 0.0, 0.0, 0.1, False)
    capped = (*plain[:8], 30.0, *plain[9:])
    for capability, of_plain, of_capped in (((8, 0), "cuda", "cuda"), ((9, 0), "cuda", "triton"),
                                            ((10, 0), "triton", "triton"), ((12, 0), "cuda", "cuda")):  # fmt: skip
        assert chosen("attention", capability, q, q, q, *plain) == of_plain
        assert chosen("attention", capability, q, q, q, *capped) == of_capped
    assert chosen("attention", (9, 0), *[q[..., :80]] * 3, *plain) == "triton"
    few, many = torch.empty(2, 4, 64), torch.empty(2, 5, 64)
    for capability, of_many in (((8, 0), "triton"), ((9, 0), "cuda"), ((10, 0), "triton")):
        assert chosen("int8_linear", capability, few) == "cuda" and chosen("int8_linear", capability, many) == of_many


def test_ranges_in_words():
    def words(first, last):
        return backend.Preference("", first, last, "", lambda: True, "", "").capabilities

    assert words((8, 0), backend.NEWEST) == "8.0 and newer"
    assert words((9, 0), (9, 0)) == "9.0" and words((8, 0), (8, 9)) == "8.0 to 8.9"
