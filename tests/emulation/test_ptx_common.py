"""What all CUDA kernels include (csrc/common/device.cuh), where the kernels' own tests do not reach."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tests.emulation import compilers
from tests.emulation.ptx.launch import empty, run

SOURCE = compilers.KERNELS / "divide.cu"


@pytest.mark.skipif(compilers.NVCC is None, reason=compilers.NO_NVCC)
def test_divide():
    """On both sides of 32 bits, for the numerator, the denominator, and both."""
    numbers = [1, 3, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 7 * 2**40 + 11, 2**62 - 1]
    a, b = np.array(list(itertools.product([0, *numbers], numbers)), np.int64).T.copy()
    out = empty(a.shape, np.int64)
    run(compilers.nvcc(SOURCE), "divide", 1, len(a), [a, b, out]).raise_if_faulty()
    assert (out.data == a // b).all()
