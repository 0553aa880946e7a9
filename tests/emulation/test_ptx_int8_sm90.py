"""The int8 tiles for Hopper: calls of int8_linear, executed as their launcher says; and what ptxas makes of them.

Before the function, results are those of the plain reference bit for bit; behind it, those of the tiles by mma.sync.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from llmkern import backend
from llmkern.int8 import op, reference
from tests.emulation import compilers
from tests.emulation.hopper import roles_keep_registers
from tests.emulation.ptx.machine import SCHEDULES
from tests.int8.cases import FLOATS, plain, row_kinds, with_outliers
from tests.int8.on_emulator import Int8OnEmulator, serve

SOURCE = compilers.ROOT / "csrc/int8/cuda_sm90.cu"
THREADS = 384
needs_nvcc = pytest.mark.skipif(compilers.NVCC is None, reason=compilers.NO_NVCC)

SCHEMES: dict[str, dict] = {
    "outliers": {}, "row": {"inputs": "row"}, "16bit": {"inputs": "16bit"},
    "groups of 64": {"inputs": "symmetric", "group": 64}, "groups of 128": {"inputs": "symmetric", "group": 128},
    "groups of 192": {"inputs": "symmetric", "group": 192},
}  # fmt: skip
#: (M, K, N): tails in every dimension, one, primes, what fits exactly, more tiles of k than stages.
SHAPES = {
    "one of k and of outputs": (65, 1, 1), "primes": (67, 131, 13), "whole tiles": (128, 256, 128),
    "around the tiles": (129, 257, 129), "many tiles of k": (66, 1000, 20),
}  # fmt: skip


@pytest.fixture
def emulator(monkeypatch):
    made = serve(monkeypatch)
    made.hopper = True
    yield made
    backend.forget_plans()


def tensors(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32, group: int = 0, **_: object):
    rows, depth, outputs = shape
    generator = torch.Generator().manual_seed(rows + depth)
    x = with_outliers(torch.randn(rows, depth, generator=generator)).to(dtype)
    weight, scale = reference.quantize_weight(torch.randn(outputs, depth, generator=generator), group)
    return x, weight, scale, torch.randn(outputs, generator=generator)


def made_by(emulator: Int8OnEmulator) -> str:
    return emulator.reports[-1][0]


def on_mma_sync(emulator: Int8OnEmulator, *args: Tensor, **kw: object) -> Tensor:
    emulator.hopper = False
    backend.forget_plans()
    out = op.int8_linear(*args, **kw)
    assert "sm90" not in made_by(emulator)
    emulator.hopper = True
    backend.forget_plans()
    return out


#: Every scheme with primes and with many tiles of k, half of them with each of the others.
CASES = [
    (shape, scheme) for i, shape in enumerate(SHAPES) for j, scheme in enumerate(SCHEMES)
    if (i + j) % 2 or shape in ("primes", "many tiles of k")
]  # fmt: skip


@pytest.mark.parametrize(("shape", "scheme"), CASES)
def test_contract(shape, scheme, emulator):
    kw = SCHEMES[scheme]
    x, weight, scale, bias = tensors(SHAPES[shape], **kw)
    assert torch.equal(op.int8_linear(x, weight, scale, bias, **kw), plain(x, weight, scale, bias, **kw))
    assert "tiles_sm90_kernel" in made_by(emulator)


@pytest.mark.parametrize(("scheme", "columns"), [("row", 128), ("row", 256), ("outliers", 128), ("outliers", 192)])
@pytest.mark.parametrize("pairs", [False, True])
def test_widths_of_tiles(scheme, columns, pairs, emulator):
    """A tile of columns and a part of one, of more rows than a tile has where the tile is narrow."""
    kw = {**SCHEMES[scheme], "activation": "swiglu" if pairs else "none"}
    emulator.tile_columns = columns
    x, weight, scale, bias = tensors(
        (134 if columns == 128 else 66, 150, columns + (14 if pairs else 36)), torch.bfloat16
    )
    out = op.int8_linear(x, weight, scale, bias, **kw)
    assert f"ELi{columns}ELi" in made_by(emulator)
    assert torch.equal(out, on_mma_sync(emulator, x, weight, scale, bias, **kw))
    torch.testing.assert_close(out, plain(x, weight, scale, bias, **kw))


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu", "swiglu", "geglu"])
def test_what_follows(activation, emulator):
    """With every dtype and kind of digits, with a residual and without one, in whole words and in parts of them."""
    index = ["none", "relu", "gelu", "gelu_tanh", "silu", "swiglu", "geglu"].index(activation)
    for i, scheme in enumerate(("row", "outliers", "groups of 64")):
        dtype, kw = FLOATS[(index + i) % 3], {**SCHEMES[scheme], "activation": activation}
        x, weight, scale, bias = tensors((66, 70, 24 if i % 2 else 22), dtype, **kw)
        columns = plain(x, weight, scale, bias, **kw).size(1)
        residual = torch.randn(66, columns).to(dtype) if (index + i) % 2 else None
        args = (x, weight, scale, (bias, bias.bfloat16(), bias.half(), None)[(index + i) % 4])
        out = op.int8_linear(*args, residual=residual, **kw)
        assert "sm90" in made_by(emulator) and out.dtype == dtype
        assert torch.equal(out, on_mma_sync(emulator, *args, residual=residual, **kw))
        torch.testing.assert_close(out, plain(*args, residual=residual, **kw))


def test_strides(emulator):
    """Rows of x, weight, residual and out that lie apart, at addresses of all kinds; scales and bias with steps."""
    x, weight, scale, bias = tensors((66, 48, 20), torch.bfloat16)
    residual = torch.randn(66, 20).bfloat16()
    expected = plain(x, weight, scale, bias, residual=residual)
    odd = torch.full((66, 59), 7.0).bfloat16()
    odd[:, 3:51] = x
    for a, w, s, b, r in (
        (odd[:, 3:51], torch.cat([weight[:, :3], weight], 1)[:, 3:], scale, bias, torch.cat([residual] * 2, 1)[:, 20:]),
        (x, torch.cat([weight, weight], 1)[:, :48], torch.stack([scale, scale], 1)[:, 0],
         torch.stack([bias, bias], 1)[:, 1], torch.cat([residual[:, :1], residual], 1)[:, 1:]),
    ):  # fmt: skip
        assert torch.equal(op.int8_linear(a, w, s, b, residual=r), expected)
    room = torch.full((66, 70), 7.0).bfloat16()
    for out in (room[:, :20], room[:, 4:24], room[:, 1:21], torch.empty(20, 66, dtype=torch.bfloat16).t()):
        assert op.int8_linear(x, weight, scale, bias, residual=residual, out=out) is out
        assert torch.equal(out, expected)
        if out.untyped_storage().data_ptr() == room.untyped_storage().data_ptr():
            out.fill_(7.0)
            assert (room == 7.0).all()
    scale_of_groups = reference.quantize_weight(torch.randn(20, 150), 64)
    x = torch.randn(70, 150)
    out = op.int8_linear(x, *scale_of_groups, inputs="symmetric", group=64)
    strided = scale_of_groups[1].t().contiguous().t()
    assert torch.equal(op.int8_linear(x, scale_of_groups[0], strided, inputs="symmetric", group=64), out)


@pytest.mark.parametrize("inputs", ["outliers", "row", "symmetric"])
def test_every_kind_of_row(inputs, emulator):
    """Rows with NaN and infinity among them, which are NaN alone."""
    kinds = torch.stack(list(row_kinds(140).values()))
    rows = torch.cat([kinds] * 5)
    weight, scale = reference.quantize_weight(torch.randn(5, 140))
    out, expected = op.int8_linear(rows, weight, scale, inputs=inputs), plain(rows, weight, scale, None, inputs=inputs)
    assert "sm90" in made_by(emulator)
    assert torch.equal(out.isnan(), expected.isnan()) and torch.equal(out.nan_to_num(0.0), expected.nan_to_num(0.0))


@pytest.mark.parametrize("scheme", ["outliers", "row", "groups of 64"])
def test_schedules_and_bits(scheme, emulator):
    """No race, wait or fence is missing under any order of the warps, and the bits are always the same."""
    kw = SCHEMES[scheme]
    x, weight, scale, bias = tensors((66, 700 if scheme == "outliers" else 300, 20), **kw)
    expected = plain(x, weight, scale, bias, **kw)
    for schedule in SCHEDULES:
        emulator.options = {"schedule": schedule, "seed": 3}
        assert torch.equal(op.int8_linear(x, weight, scale, bias, **kw), expected)


def counts_of(emulator: Int8OnEmulator, shape: tuple[int, int, int], x: Tensor | None = None, **kw: object):
    emulator.options, emulator.reports = {"counts": True}, []
    own, weight, scale, bias = tensors(shape, torch.bfloat16, **kw)
    x = own if x is None else x
    out = op.int8_linear(x, weight, scale, bias, **kw)
    assert torch.equal(out, plain(x, weight, scale, bias, **kw))
    return emulator.reports[-1][1].counts


def test_counts(emulator):
    """The products of whole tiles and no more, no bank conflict, results by whole sectors."""
    for name, kind, columns in (("row", "u8", 256), ("groups of 128", "s8", 128), ("groups of 64", "s8", 128)):
        emulator.tile_columns = columns
        counts = counts_of(emulator, (128, 384, 256), **SCHEMES[name])
        steps = 2 * 256 // columns * 384 // 32
        assert counts.matrix == {f"wgmma.mma_async.m64n{columns}k32.s32.{kind}.s8": steps}
        assert counts.conflicts == 0
        stores = [s for s in counts.sites if s.space == "global" and s.writes]
        assert [(s.units, s.bytes) for s in stores if s.units] == [(s.fewest, s.bytes) for s in stores if s.units]
        assert sum(s.bytes for s in stores) == 128 * 256 * 2
        assert all(".v2." in s.text for s in stores if s.units)


def test_high_digits_are_multiplied_where_they_are(emulator):
    """One outlier: 16 values of k have high digits, and the products of 32 are made again, in one tile of rows."""
    x = torch.randn(256, 512).clamp(-2, 2).bfloat16()
    x[5, 100] = 500.0
    emulator.tile_columns = 128
    counts = counts_of(emulator, (256, 512, 128), x)
    assert counts.matrix == {
        "wgmma.mma_async.m64n128k32.s32.u8.s8": 4 * 512 // 32, "wgmma.mma_async.m64n128k32.s32.s8.s8": 2,
    }  # fmt: skip
    assert counts.conflicts == 0
    copies = [s for s in counts.sites if s.text.startswith("cp.async.cg") and s.space == "global"]
    assert sum(s.bytes for s in copies) == 16  # of 1024 pieces of the tile one is read
    whole = counts_of(emulator, (128, 256, 128), inputs="16bit")
    assert whole.matrix == {f"wgmma.mma_async.m64n128k32.s32.{kind}.s8": 2 * 256 // 32 for kind in ("u8", "s8")}
    assert whole.conflicts == 0


WRONG = "the result is not the expected one"


def only(kind: str) -> tuple[tuple[str, str], ...]:
    """Changes that leave one kernel of this kind of digits alone, so that it compiles in a fraction of the time."""
    calls = {
        "one": ("return launch_wide<Digits::one, 256>(p, device, stream);", "return;"),
        "two": ("return launch_wide<Digits::two, 192>(p, device, stream);", "return;"),
        "groups": ("launch<Tile<Digits::groups, 128, 64>>(p, device, stream)", "void(0)"),
    }
    changes = [change for name, change in calls.items() if name != kind]
    changes.append(("launch<Tile<Digits::groups, 128>>(p, device, stream)", "void(0)"))
    return (*changes, ("    launch<Tile<kDigits, kWide>>(p, device, stream);", "    return;"))


#: What is taken out or changed -> (kind of digits, old, new, what is found).
FAULTS = {
    "the wait for a full stage": ("one", "{ barrier_wait(shared.control().full[ring.stage], ring.parity); }", "{}",
                                  "missing wait|uninitialised|race"),
    "the wait for an empty stage": ("one", "    barrier_wait(control.empty[ring.stage], ring.parity ^ 1);\n"
                                    "    barrier_expect", "    barrier_expect", "missing wait|race"),
    "the bytes of a tile": ("one", "barrier_expect(full, T::kHigh);", "barrier_expect(full, T::kHigh + 16);",
                            "deadlock"),
    "the wait for products before their stage is released": ("one", "wgmma_wait<1>();\n      release(before);",
                                                             "release(before);", "missing wait"),
    "the last wait": ("one", "    wgmma_wait<0>();\n    wgmma_sums(low);\n    wgmma_sums(high);",
                      "    wgmma_sums(low);\n    wgmma_sums(high);", "missing wait"),
    "the meeting before the stages are written over": ("one", "named_sync(kBoth, kConsumers * kWarpgroup);", "",
                                                       "missing wait|race"),
    "the warp's meeting before it reads": ("one", "    __syncwarp();\n    finish_rows", "    finish_rows", "race"),
    "registers that one warp gives": ("one", "    registers_give<kProducerRegisters>();",
                                      "    if (warp == 0) registers_give<kProducerRegisters>();",
                                      "collective|deadlock"),
    "the halves of pairs": ("one", "p.pairs ? first + outputs / 2", "p.pairs ? first", WRONG),
    "the fence of high digits": ("two", "      async_fence();\n      arrive_with_warp(control.full[behind]);",
                                 "      arrive_with_warp(control.full[behind]);", "missing fence"),
    "the wait for high digits": ("two", "wait_for_copies<1>();", "wait_for_copies<2>();", "missing wait"),
    "high digits that are not there": ("two", "const bool there = m < rows &&", "const bool there = m < rows ||",
                                       "uninitialised|out of bounds"),
    "the bits of other pieces": ("two", "(any | any >> 1) & 0x55", "any & 0x55", WRONG),
    "the zeros of the bits": ("two", "control.any_bits[i] = 0;", "(void)i;", "uninitialised"),
    "the end of the last group": ("groups", "(end >= depth || end % ", "(end % ", WRONG),
    "the fresh sums of a group": ("groups", "adds || k > unit * T::kUnit", "true", WRONG),
    "a helper's arrival": ("groups", "1 + (T::kTwo || T::kGroups ? kHelperWarps : 0)",
                           "1 + (T::kTwo || T::kGroups ? 1 : 0)", "mbarrier|race"),
}  # fmt: skip
CALLS = {"one": ("row", 1000), "two": ("outliers", 710), "groups": ("groups of 192", 300)}


@functools.lru_cache
def arguments(kind: str) -> tuple[tuple[Tensor, ...], dict, Tensor]:
    scheme, depth = CALLS[kind]
    kw = {**SCHEMES[scheme], "activation": "swiglu" if kind == "one" else "none"}
    made = tensors((66, depth, 24), **kw)
    if kind == "two":
        made[0].clamp_(-3, 3)
        made[0][3, 20] = made[0][60, 290] = made[0][9, 420] = made[0][4, 700] = 200.0
    return made, kw, plain(*made, **kw)


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(name, emulator):
    kind, old, new, found = FAULTS[name]
    args, kw, expected = arguments(kind)
    emulator.use(compilers.nvcc(SOURCE, "90a", ((old, new), *only(kind))))
    with pytest.raises(AssertionError, match=found):
        out = op.int8_linear(*args, **kw)
        assert torch.allclose(out, expected, rtol=1e-4, atol=1e-4), WRONG


@needs_nvcc
def test_registers(tmp_path):
    """Nothing is spilled, ptxas adds no wait of its own, and each role keeps to the registers that it has taken."""
    assert "injected" not in roles_keep_registers(SOURCE, tmp_path, 6, THREADS)
