"""The PTX that Triton makes of a dense mask's table and of the kernels that go by it."""

from __future__ import annotations

import functools

import pytest
import torch

from llmkern import backend, triton
from llmkern.attention import op, triton_mask_launch
from llmkern.attention.mask import Mask
from llmkern.attention.triton_configurations import Configuration
from llmkern.verify import verify
from tests.attention.cases import attend, tensors
from tests.attention.mask_cases import looked_at, masks
from tests.attention.on_triton import serve

pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux)")
from tests.emulation.ptx.launch import EmulationError
from tests.emulation.triton_on_ptx import Emulated

SMALL = Configuration(32, 32, 4, 1)
SHAPE = (1, 2, 1, 40, 70, 32, 16)


@pytest.fixture(autouse=True)
def plans():
    yield
    backend.forget_plans()


@pytest.mark.parametrize(("capability", "name"), [(80, "shared by all"), (90, "numbers among them")])
def test_the_contract(capability, name, monkeypatch):
    """Forward and gradients, of hidden, seen and mixed tiles with tails."""
    looked_at(monkeypatch, True)
    run, dtype = Emulated(capability), torch.float16
    serve(monkeypatch, run, f"sm_{capability}", SMALL)
    mask = masks(SHAPE)[name]
    mask = mask if mask.dtype == torch.bool else mask.to(dtype)  # without a gradient, with which there is no table
    functions = (functools.partial(attend(plain=plain), mask=mask) for plain in (False, True))
    verify(*functions, tensors(SHAPE, dtype)).raise_if_failed()
    assert [name for _, name in run.launched] == [
        "attention_mask_tiles_kernel", "attention_forward_kernel", "attention_mask_tiles_kernel",
        "attention_statistics_kernel", "attention_backward_query_kernel", "attention_backward_key_kernel",
    ]  # fmt: skip


def test_hidden_tiles_are_not_computed_and_seen_ones_read_no_mask(monkeypatch):
    """Counted, of 2 x 3 tiles: four of them seen; all; four mixed."""
    looked_at(monkeypatch, True)
    run = Emulated(counts=True)
    serve(monkeypatch, run, tile=SMALL)
    q, k, v = tensors((1, 1, 1, 64, 96, 32, 32), torch.float16)
    dense = torch.ones(1, 1, 64, 96, dtype=torch.bool)
    dense[..., :32, 64:], dense[..., 32:, :32] = False, False
    products, read = [], []
    for mask in (dense, torch.ones_like(dense), dense & (torch.arange(96) % 3 > 0)):
        op.attention(q, k, v, Mask(mask), 0.25)
        counts = run.report_of("attention_forward_kernel").counts
        products.append(sum(counts.matrix.values()))
        read.append(sum(site.bytes for site in counts.sites if "ld.global.b8" in site.text))
    assert products[1] > 0 and products[0] * 6 == products[1] * 4 and products[2] == products[0]
    assert read[0] == read[1] and read[2] - read[0] == 4 * 32 * 32  # the table's bytes, and the mask's


def test_the_table_of_long_rows(monkeypatch):
    """More tiles than a program has, read 16 bytes at a time; bytes and numbers, none behind the end."""
    run = Emulated()
    for dense in (torch.rand(1, 1, 33, 304) > 0.999, torch.where(torch.rand(1, 1, 33, 304) > 0.001, 0.0, -torch.inf)):
        looked_at(monkeypatch, True)
        serve(monkeypatch, run, tile=SMALL)
        q, k, v = tensors((1, 2, 1, 33, 304, 16, 16), torch.float16)
        call = triton_mask_launch.Call(q, k, v, (*Mask(dense).arguments(), 0.25, False))
        table = triton_mask_launch.MaskTiles(run, call, dense).make(dense, q)
        seen, to_read = (dense, ~dense) if dense.dtype == torch.bool else (dense != -torch.inf, dense != 0)
        for rows in (slice(0, 32), slice(32, 33)):
            for tile in range(10):
                part = (0, 0, rows, slice(tile * 32, tile * 32 + 32))
                expected = int(seen[part].any()) + 2 * int(to_read[part].any())
                assert table[0, 0, rows.start // 32, tile] == expected, (rows, tile)
    assert "ld.global.v4.b32" in run.ptx[0]


@pytest.mark.parametrize("more", [{"rows": 1}, {"columns": 16}])
def test_planted_faults_are_found(more, monkeypatch):
    looked_at(monkeypatch, True)
    run = Emulated()
    run.more = more
    serve(monkeypatch, run, tile=SMALL)
    q, k, v = tensors((1, 2, 1, 33, 48, 16, 16), torch.float16)
    with pytest.raises(EmulationError, match=r"out of bounds|uninitialised|read"):
        op.attention(q, k, v, Mask(torch.ones(1, 1, 33, 48, dtype=torch.bool)), 0.25)


def test_the_launcher_names_the_kernels_arguments():
    """In their order, which the launcher gives by place."""
    for launch in triton_mask_launch.examples(torch.bool):
        names = [n for n in triton.function(launch).arg_names if n not in launch.constants]
        assert len(names) == len(launch.arguments) and set(launch.written) <= set(names)
