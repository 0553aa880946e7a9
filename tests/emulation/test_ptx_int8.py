"""What the int8 CUDA kernels move and multiply, under every schedule; and faults planted in them, to be found."""

from __future__ import annotations

import pytest
import torch

from llmkern import backend
from llmkern.int8 import op, reference
from tests.emulation import compilers
from tests.emulation.ptx.launch import EmulationError
from tests.emulation.ptx.machine import SCHEDULES
from tests.int8.cases import positional, with_outliers
from tests.int8.on_emulator import serve


@pytest.fixture
def emulator(monkeypatch):
    yield serve(monkeypatch)
    backend.forget_plans()


class Wrong(AssertionError):
    """The result is not the expected one."""


def multiply(shape: tuple[int, int, int], scheme: str, dtype: torch.dtype = torch.bfloat16, outliers: bool = True):
    rows, depth, outputs = shape
    kw = {"inputs": "symmetric", "group": 64} if scheme == "groups" else {"inputs": scheme}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, depth, generator=generator)
    x = (with_outliers(x) if outliers else x.clamp(-2, 2)).to(dtype)
    weight, scale = reference.quantize_weight(torch.randn(outputs, depth, generator=generator), kw.get("group", 0))
    out = op.int8_linear(x, weight, scale, **kw)
    expected = reference.int8_linear(x, weight, scale, None, *positional(**kw))
    if not (torch.equal(out, expected) or (scheme == "groups" and torch.allclose(out, expected, rtol=1e-2))):
        raise Wrong


@pytest.mark.parametrize("schedule", SCHEDULES[1:])
def test_schedules(schedule, emulator):
    emulator.options = {"schedule": schedule}
    multiply((2, 80, 6), "outliers")
    multiply((9, 328, 12), "outliers")
    multiply((9, 328, 12), "groups")


def counts_of(emulator, name: str):
    (found,) = (report.counts for kernel, report in emulator.reports if name in kernel)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["outliers", "16bit", "groups"])
def test_quantization_reads_a_row_once(scheme, dtype, emulator):
    emulator.options = {"counts": True}
    rows, depth = 3, 2048
    multiply((rows, depth, 4), scheme, dtype)
    counts = counts_of(emulator, "quantize_kernel")
    assert sum(counts.sectors) <= 1.05 * sum(counts.fewest)
    assert counts.sectors[0] == rows * depth * dtype.itemsize // 32  # what no version avoids
    assert counts.conflicts == 0
    wide = [site for site in counts.sites if site.space == "global" and site.bytes > 1000]
    assert len(wide) >= 2 and all(site.bytes // 16 >= site.requests and ".v4." in site.text for site in wide)


@pytest.mark.parametrize("scheme", ["outliers", "row", "groups"])
def test_few_rows_read_a_weight_once(scheme, emulator):
    emulator.options = {"counts": True}
    rows, depth, outputs = 4, 2048, 32
    multiply((rows, depth, outputs), scheme, outliers=False)
    counts = counts_of(emulator, "few_rows_kernel")
    assert sum(counts.sectors) <= 1.05 * sum(counts.fewest)
    weights = [site for site in counts.sites if "no_allocate" in site.text]
    assert sum(site.units for site in weights) == outputs * depth // 32
    assert all(".v4." in site.text for site in weights)
    assert counts.conflicts == 0


def test_tiles_have_no_bank_conflicts(emulator):
    emulator.options = {"counts": True}
    for scheme, tile_rows in (("outliers", 64), ("row", 128), ("groups", 64)):
        emulator.reports, emulator.tile_rows = [], tile_rows
        multiply((70, 192, 128), scheme)
        counts = counts_of(emulator, "tiles_kernel")
        assert counts.conflicts == 0
        copies = [site for site in counts.sites if "cp.async" in site.text and site.space == "global"]
        assert copies and all(", 16" in site.text for site in copies)


def test_high_digits_are_multiplied_where_they_are(emulator):
    """One outlier in 256 values of k: 16 values of k have high digits, and the products of 32 are made again."""
    emulator.options = {"counts": True}
    x = torch.randn(64, 256).clamp(-2, 2)
    x[5, 100] = 500.0
    weight, scale = reference.quantize_weight(torch.randn(128, 256))
    out = op.int8_linear(x, weight, scale)
    assert torch.equal(out, reference.int8_linear(x, weight, scale, None))
    steps = 64 // 16 * 128 // 8
    products = counts_of(emulator, "tiles_kernel").matrix
    assert products == {"mma.m16n8k32.s32.u8.s8.s32": steps * 256 // 32, "mma.m16n8k32.s32.s8.s8.s32": steps}


# (file, old, new, shape, scheme)
FAULTS = {
    "a wait too few": ("cuda_tiles", "wait_for_copies<T::kStages - 2>()", "wait_for_copies<T::kStages - 1>()",
                       (9, 328, 12), "row"),
    "a barrier too few": ("cuda_tiles", "    __syncthreads();  // the tile", "    // the tile", (9, 328, 12), "row"),
    "high digits that are not there": ("cuda_tiles", "if (there) there", "if (false) there", (9, 328, 12), "outliers"),
    "a group that ends too late": ("cuda_tiles", "k + kMultiplyDepth >= group_end ||", "k >= group_end ||",
                                   (9, 328, 12), "groups"),
    "rows beyond the last": ("cuda_few_rows", "row = min(m, rows - 1), at", "row = m, at", (3, 80, 6), "row"),
    "the wrong bit": ("cuda_few_rows", "(k / kDigitPiece % 32) & 1", "(k / kDigitPiece % 31) & 1", (3, 900, 6),
                      "outliers"),
    "the mean before it is there": ("cuda_quantize", "      __syncthreads();\n      mean", "      mean", (3, 80, 6),
                                    "outliers"),
    "sums in another order": ("cuda_quantize", "half = kSums / 4; half; half /= 2", "half = 1; half <= 16; half *= 2",
                              (40, 900, 6), "outliers"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault, emulator):
    file, old, new, shape, scheme = FAULTS[fault]
    emulator.use(compilers.nvcc(compilers.ROOT / f"csrc/int8/{file}.cu", "80", ((old, new),)))
    with pytest.raises((EmulationError, Wrong)):
        multiply(shape, scheme, torch.float32)
