"""The instruction sets of this family: those that add products of bytes alone are tested here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from llmkern import backend, extension
from tests.conftest import BYTE_ISAS


def _forced(name: str) -> Iterator[str]:
    extension._C.force_isa(name)
    backend.forget_plans()
    yield name
    extension._C.force_isa("")
    backend.forget_plans()


@pytest.fixture(params=BYTE_ISAS)
def isa(request):
    yield from _forced(request.param)


@pytest.fixture(params=BYTE_ISAS[:1])
def one_isa(request):
    """The best one alone: for what Python does around the kernels."""
    yield from _forced(request.param)
