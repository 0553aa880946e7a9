"""Dense masks looked at by tiles: run by the interpreter, compiled for AMD, and when it is done.

tests/emulation/test_ptx_attention_triton_mask.py executes what the compiler makes of it.
"""

from __future__ import annotations

import re

import pytest
import torch

from llmkern import triton
from llmkern.attention import triton_launch
from llmkern.attention.mask import Mask
from llmkern.attention.triton_call import Call
from llmkern.attention.triton_mask_launch import LEAST, MaskTiles
from tests.amd import gfx942
from tests.emulation.triton_interpreter import run_tests


def test_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux)")
    report = run_tests("tests/attention/interpreted_triton_mask.py")
    assert re.search(r"\d{2,} passed", report.strip().splitlines()[-1]), report


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16])
def test_compiled_for_amd(dtype):
    """No spills, in the table's kernel and in those that go by it."""
    mask = Mask(torch.empty(1, 1, 256, 256, dtype=dtype, device="meta"))
    launches = list(triton_launch.examples("gfx942", torch.bfloat16, 64, mask))
    assert [x.kernel for x in launches].count("attention_mask_tiles_kernel") == 2
    for launch in {x.kernel: x for x in launches}.values():
        gfx942(launch)


def shape_of(mask, queries=LEAST, keys=LEAST, mask_grad=False):
    """The table's shape and strides for 2 batches of 4 heads, or None where there is no table."""
    q, k = (torch.empty(2, 4, n, 16, device="meta") for n in (queries, keys))
    launches: list[triton.Launch] = []
    tiles = MaskTiles(launches.append, Call(q, k, k, (*Mask(mask).arguments(), 0.25, False)), mask, mask_grad)
    table = tiles.make(mask, q)
    if not tiles.wanted:
        assert table is q and not launches and tiles.steps == (0, 0, 0, 0)
        return None
    (launch,) = launches
    assert launch.arguments[1] is table
    return tuple(table.shape), tiles.steps


def dense(*shape, dtype=torch.bool):
    return torch.empty(shape, dtype=dtype, device="meta")


def test_one_table_for_all_that_a_mask_is_broadcast_over():
    """A byte for each tile of what is stored."""
    n = LEAST
    assert shape_of(dense(1, 1, n, n)) == ((1, 1, 4, 4), (0, 0, 4, 1))
    assert shape_of(dense(2, 1, n, n)) == ((2, 1, 4, 4), (16, 0, 4, 1))
    assert shape_of(dense(2, 4, n, n + 1), keys=n + 1) == ((2, 4, 4, 5), (80, 20, 5, 1))
    assert shape_of(dense(2, 1, 1, n)) == ((2, 1, 1, 4), (4, 0, 0, 1))
    assert shape_of(dense(1, 4, n, 1)) == ((1, 4, 4, 1), (0, 4, 1, 0))
    assert shape_of(dense(1, 1, n, n).expand(2, 4, n, n)) == ((1, 1, 4, 4), (0, 0, 4, 1))


def test_when_it_would_not_pay():
    """By shapes alone: few queries or keys, numbers of every head's own, and a bias that is learned."""
    n = LEAST
    assert shape_of(dense(1, 1, n - 1, n), queries=n - 1) is None
    assert shape_of(dense(1, 1, n, n - 1), keys=n - 1) is None
    assert shape_of(None) is None
    assert shape_of(dense(2, 4, n, n, dtype=torch.float16)) is None
    assert shape_of(dense(1, 4, n, n, dtype=torch.float16)) is not None
    assert shape_of(dense(1, 1, n, n, dtype=torch.float16), mask_grad=True) is None
