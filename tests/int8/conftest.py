"""The instruction sets of this family: those that add products of bytes alone are tested here and nowhere else."""

from __future__ import annotations

import pytest

from llmkern import backend, extension
from tests.conftest import BYTE_ISAS


@pytest.fixture(params=BYTE_ISAS)
def isa(request):
    extension._C.force_isa(request.param)
    backend.forget_plans()
    yield request.param
    extension._C.force_isa("")
    backend.forget_plans()
