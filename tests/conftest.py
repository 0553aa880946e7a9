"""What every test shares: unwritten memory is NaN, and the instruction sets of this processor, forced one by one."""

from __future__ import annotations

import os

import pytest
import torch

from llmkern import backend, extension
from llmkern.int8 import cost

SUPPORTED = extension._C.supported_isas() if extension._C else []
#: LLMKERN_TEST_ISAS narrows the choice, where one of them is what is under test (`make emulate`).
BYTE_ISAS = os.environ.get("LLMKERN_TEST_ISAS", "").split() or SUPPORTED
#: Those that differ from others in more than products of bytes.
ISAS = [isa for isa in BYTE_ISAS if extension._C.isa_base(isa) == isa] if extension._C else []


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan():
    """Fills torch.empty with NaN (integers with their largest value), so that an element never written is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def int8_pays(monkeypatch, request):
    """quantize_model replaces tiny layers too, as if they gained; tests marked `measured` see what it measures."""
    if "measured" not in request.keywords:
        gains = cost.Verdict({1: 2.0}, {1: 1.0}, False)
        monkeypatch.setattr(cost, "compare", lambda *args, **kwargs: gains)


@pytest.fixture(params=ISAS)
def isa(request):
    """Runs the test once for each instruction set of the library that this processor has."""
    extension._C.force_isa(request.param)
    backend.forget_plans()
    yield request.param
    extension._C.force_isa("")
    backend.forget_plans()
