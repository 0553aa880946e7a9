"""The CUDA backend of int8_linear: its kernels' PTX, executed by the emulator, against the plain version."""

from __future__ import annotations

import re
import subprocess

import pytest
import torch
from torch import Tensor

from llmkern import backend, extension
from llmkern.int8 import cuda, op, packing, reference
from llmkern.int8.compiled import MOST_DEPTH
from llmkern.verify import verify
from tests.emulation import compilers
from tests.int8.cases import FLOATS, QUANTIZATIONS, of_scheme, plain, positional, row_kinds
from tests.int8.on_emulator import serve

SCHEMES = {  # that the kernels take
    name: kw
    for name, kw in QUANTIZATIONS.items()
    if "rotate" not in kw and ("group" not in kw or kw["inputs"] == "symmetric")
}
# (M, K, N): of few rows and of tiles
SHAPES = {
    "one of everything": (1, 1, 1), "one row": (1, 2100, 6), "few rows": (4, 64, 9), "primes": (7, 131, 13),
    "just more than few": (9, 33, 17), "two tiles": (70, 200, 130), "no columns": (3, 0, 4),
    "many without columns": (12, 0, 4), "no rows": (0, 8, 4), "no outputs": (3, 8, 0),
}  # fmt: skip
#: The tiles for Hopper are in tests/emulation/test_ptx_int8_sm90.py.
SOURCES = sorted(s for s in compilers.ROOT.glob("csrc/int8/cuda*.cu") if "sm90" not in s.stem)


@pytest.fixture
def emulator(monkeypatch):
    yield serve(monkeypatch)
    backend.forget_plans()


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0.0), b.nan_to_num(0.0))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_schemes(shape, scheme, emulator):
    """Bit for bit, but for groups of few rows, whose parts are added in another order."""
    kw = SCHEMES[scheme]
    x, weight, scale, bias = of_scheme(shape, torch.float32, kw)
    if "group" in kw and 0 < shape[0] <= 8:
        function = lambda x, bias: op.int8_linear(x, weight, scale, bias, **kw)  # noqa: E731
        verify(
            function, lambda x, bias: plain(x, weight, scale, bias, **kw), (x, bias), gradients=False
        ).raise_if_failed()
    else:
        assert same(op.int8_linear(x, weight, scale, bias, **kw), plain(x, weight, scale, bias, **kw))


@pytest.mark.parametrize("dtype", FLOATS[1:])
@pytest.mark.parametrize("scheme", ["outliers", "row", "groups of 32"])
def test_half_precision(scheme, dtype, emulator):
    kw = SCHEMES[scheme]
    for shape in ((2, 72, 5), (20, 40, 9)):
        x, weight, scale, bias = of_scheme(shape, dtype, kw)
        for b in (None, bias, bias.bfloat16(), bias.half()):
            out, expected = op.int8_linear(x, weight, scale, b, **kw), plain(x, weight, scale, b, **kw)
            assert out.dtype == dtype
            if "group" in kw and shape[0] <= 8:
                torch.testing.assert_close(out, expected)  # one rounding to dtype may differ
            else:
                assert torch.equal(out, expected)


@pytest.mark.parametrize("tile_rows", [64, 128])
@pytest.mark.parametrize("scheme", ["row", "outliers", "groups of 96"])
def test_both_sizes_of_tiles(scheme, tile_rows, emulator):
    """With groups there are tiles of 64 rows alone."""
    kw = SCHEMES[scheme]
    emulator.tile_rows = tile_rows
    x, weight, scale, bias = of_scheme((150, 328, 20), torch.bfloat16, kw)
    assert torch.equal(op.int8_linear(x, weight, scale, bias, **kw), plain(x, weight, scale, bias, **kw))
    made = 64 if "group" in kw else tile_rows
    assert f"tiles_kernelILi{made}E" in emulator.reports[-1][0]


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", "swiglu", "geglu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_follows(dtype, activation, emulator):
    for shape, scheme in (((5, 64, 14), "row"), ((12, 80, 138), "outliers"), ((12, 80, 70), "groups of 32")):
        kw = {**SCHEMES[scheme], "activation": activation}
        x, weight, scale, bias = of_scheme(shape, dtype, kw)
        residual = torch.randn(shape[0], shape[2] // (2 if activation in ("swiglu", "geglu") else 1)).to(dtype)
        for r in (None, residual):
            verify(
                lambda x, bias, r, kw=kw, w=weight, s=scale: op.int8_linear(x, w, s, bias, residual=r, **kw),
                lambda x, bias, r, kw=kw, w=weight, s=scale: plain(x, w, s, bias, residual=r, **kw),
                (x, bias, r), gradients=False,
            ).raise_if_failed()  # fmt: skip


@pytest.mark.parametrize("rows", [3, 11])
def test_strides(rows, emulator):
    x, weight, scale, bias = of_scheme((rows, 48, 20), torch.bfloat16, {})
    residual = torch.randn(rows, 20).bfloat16()
    expected = plain(x, weight, scale, bias, residual=residual)
    room = torch.full((rows, 70), 7.0).bfloat16()
    odd = torch.full((rows, 59), 7.0).bfloat16()
    odd[:, 3:51] = x
    for a, w, s, b, r in (
        (odd[:, 3:51], weight, scale, bias, residual),  # rows at any address
        (x.t().contiguous().t(), weight, scale, bias, residual),
        (x, torch.cat([weight, weight], 1)[:, :48], scale, bias, residual),
        (x, torch.cat([weight[:, :3], weight], 1)[:, 3:], scale, bias, residual),
        (x, weight.t().contiguous().t(), scale, bias, residual),
        (x, weight, torch.stack([scale, scale], 1)[:, 0], torch.stack([bias, bias], 1)[:, 1], residual),
        (x, weight, scale, bias, torch.cat([residual, residual], 1)[:, 20:]),
        (x, weight, scale, bias, residual.t().contiguous().t()),
    ):
        assert torch.equal(op.int8_linear(a, w, s, b, residual=r), expected)
    for out in (room[:, :20], room[:, 1:21], room[:, 1:60:3], torch.empty(20, rows, dtype=torch.bfloat16).t()):
        before = room.clone()
        assert op.int8_linear(x, weight, scale, bias, residual=residual, out=out) is out
        assert torch.equal(out, expected)
        if out.untyped_storage().data_ptr() == room.untyped_storage().data_ptr():
            out.fill_(7.0)
            assert torch.equal(room[:, 61:], before[:, 61:]) and (room == 7.0).all()
    many = torch.stack([x, x + 1])
    assert torch.equal(op.int8_linear(many, weight, scale, bias)[1], op.int8_linear(x + 1, weight, scale, bias))


def test_scales_of_groups_with_strides(emulator):
    for rows in (2, 10):
        x, weight, scale, _ = of_scheme((rows, 100, 9), torch.float32, SCHEMES["groups of 32"])
        expected = op.int8_linear(x, weight, scale, inputs="symmetric", group=32)
        strided = scale.t().contiguous().t()
        assert torch.equal(op.int8_linear(x, weight, strided, inputs="symmetric", group=32), expected)


def digits_of(raw, rows: int, depth: int, two: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Integers, scales and zero points from the memory between the kernels, laid out by csrc/int8/cuda.h."""
    raw, at = torch.from_numpy(raw.copy()), 0

    def take(count: int, dtype: torch.dtype) -> Tensor:
        nonlocal at
        size = count * torch.empty(0, dtype=dtype).element_size()
        part = raw[at : at + size].view(dtype)
        at += -(-size // 16) * 16
        return part

    stride, words = -(-depth // 16) * 16, -(-depth // 512)
    u = take(rows * stride, torch.uint8).view(rows, stride).int()
    if two:
        high = take(rows * stride, torch.int8).view(rows, stride).int()
        bits = take(rows * words, torch.int32).view(rows, words)
        pieces = torch.arange(stride) // 16
        u = u + 256 * high * (bits[:, pieces // 32] >> (pieces % 32) & 1)
    return u[:, :depth], take(rows, torch.float32), take(rows, torch.int32)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("depth", [5, 77, 640])
def test_the_integers_of_every_kind_of_row(depth, dtype, emulator):
    rows = torch.stack(list(row_kinds(depth).values())).to(dtype)
    weight, weight_scale = reference.quantize_weight(torch.randn(3, depth))
    for name in ("outliers", "row", "symmetric", "static", "16bit"):
        kw = SCHEMES[name]
        y = op.int8_linear(rows, weight, weight_scale, **kw)
        assert same(y, plain(rows, weight, weight_scale, None, **kw)), name
        u, scale, zero = digits_of(emulator.digits, len(rows), depth, name in ("outliers", "16bit"))
        expected = reference.quantize_rows(rows, kw.get("inputs", "outliers"), input_scale=kw.get("input_scale"))
        assert same(scale, expected[1]), name
        whole = ~scale.isnan()  # the others give NaN, whatever their integers
        assert torch.equal(u[whole], expected[0][whole]) and torch.equal(zero[whole], expected[2][whole]), name


def test_the_cpus_results(emulator):
    x, weight, scale, bias = of_scheme((10, 300, 33), torch.float32, {})
    with_cuda = op.int8_linear(x, weight, scale, bias)
    cpu = op.CPU_INT8_LINEAR.plan(x, weight, scale, bias, *positional())(x, weight, scale, bias, *positional())
    assert torch.equal(with_cuda, cpu)


def tiles_of(emulator, shape: tuple[int, int, int], **kw: object) -> str:
    """Which kernel made the products."""
    emulator.reports = []
    x, weight, scale, bias = of_scheme(shape, torch.bfloat16, kw)
    out = op.int8_linear(x, weight, scale, bias, **kw)
    torch.testing.assert_close(out, plain(x, weight, scale, bias, **kw))
    return re.search("few_rows|tiles_sm90|tiles", emulator.reports[-1][0])[0]


def test_which_tiles(emulator):
    """Those for Hopper on such a device alone, where they serve the call; the others serve the rest."""
    assert tiles_of(emulator, (65, 40, 9)) == "tiles"
    backend.forget_plans()
    emulator.hopper = True
    assert tiles_of(emulator, (65, 40, 9)) == "tiles_sm90"
    assert tiles_of(emulator, (64, 40, 9)) == "tiles"
    assert tiles_of(emulator, (8, 40, 9)) == "few_rows"
    assert tiles_of(emulator, (65, 0, 9)) == "tiles"
    assert tiles_of(emulator, (65, 192, 9), inputs="symmetric", group=64) == "tiles_sm90"
    assert tiles_of(emulator, (65, 192, 9), inputs="symmetric", group=96) == "tiles"


def test_the_choice_is_made_once(emulator, monkeypatch):
    emulator.hopper = True
    x, weight, scale, _ = of_scheme((65, 40, 9), torch.bfloat16, {})
    op.int8_linear(x, weight, scale)
    monkeypatch.setattr("llmkern.cuda.is_hopper", lambda device: pytest.fail("asked again"))
    op.int8_linear(x, weight, scale)
    assert "tiles_sm90" in emulator.reports[-1][0]


def hopper_refuses(rows=65, outputs=3, depth=8, group=0) -> str | None:
    plan = extension._C.Int8LinearPlan(
        rows=rows, outputs=outputs, depth=depth, x_stride=depth, residual_stride=0, out_stride=outputs,
        quantization=extension._C.Quantization(1, False, group, 1), activation=0, dtype=0, bias_dtype=0,
    )  # fmt: skip
    return extension._C.int8_sm90_unsupported(plan)


@pytest.mark.skipif(not extension._C.cuda_architectures, reason="the library has no CUDA part")
def test_why_the_tiles_for_hopper_cannot_serve():
    if "90" not in extension._C.cuda_architectures:
        assert "built without the kernels for Hopper" in hopper_refuses()
        return
    assert hopper_refuses() is None and hopper_refuses(depth=256, group=128) is None
    assert "up to 64 would leave half idle" in hopper_refuses(rows=64)
    assert "at least one value of k" in hopper_refuses(depth=0)
    assert "multiples of 64" in hopper_refuses(depth=256, group=32)
    assert "at most 2**30" in hopper_refuses(rows=2**30 + 1) and "at most 2**30" in hopper_refuses(outputs=2**30 + 1)


def test_changed_weights_are_seen(emulator):
    x, weight, scale, _ = of_scheme((3, 37, 5), torch.float32, {})
    first = op.int8_linear(x, weight, scale)
    aligned = packing.rows_of_16(weight, packing.layout_of(weight))
    assert packing.rows_of_16(weight, packing.layout_of(weight)) is aligned and aligned.stride(0) == 48
    weight.neg_()
    assert torch.equal(op.int8_linear(x, weight, scale), -first)
    assert packing.rows_of_16(weight, packing.layout_of(weight)) is not aligned


def test_another_device_is_an_error(emulator):
    plan = extension._C.Int8LinearPlan(
        rows=1, outputs=1, depth=1, x_stride=1, residual_stride=0, out_stride=1,
        quantization=extension._C.Quantization(0, False, 0, 1), activation=0, dtype=0, bias_dtype=0,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="int8_quantize: the launch on CUDA device 3 failed: invalid device"):
        emulator.module.int8_linear_cuda(plan, *[0] * 12, 3, 0, False)


def refused(
    depth=8, dtype=torch.float32, bias_dtype=torch.float32, rotate=1, group=0, inputs="row", rows=2, outputs=3
):  # fmt: skip
    x, weight = (
        torch.empty(rows, depth, dtype=dtype, device="meta"),
        torch.empty(outputs, depth, dtype=torch.int8, device="meta"),
    )
    scale, bias = torch.empty(outputs, device="meta"), torch.empty(outputs, dtype=bias_dtype, device="meta")
    return cuda._refused(x, weight, scale, bias, None, None, inputs, group, rotate, "none")


def test_why_it_cannot_serve():
    assert refused() is None
    assert refused(dtype=torch.float64) == "x is torch.float64, not float32, bfloat16 or float16"
    assert refused(bias_dtype=torch.float64) == "bias is torch.float64, not float32, bfloat16 or float16"
    assert "Hadamard" in refused(depth=32, rotate=2)
    assert "groups of 'symmetric' inputs alone" in refused(depth=64, group=32)
    assert "overflow" in refused(depth=MOST_DEPTH + 1)
    assert refused(depth=32, rows=2**31 - 1) is None
    words = "its kernels take up to 2^31 - 1 rows of x and of the weight, not 2147483648"
    assert refused(depth=32, rows=2**31) == refused(depth=32, outputs=2**31) == words
    assert "a block holds" in refused(depth=24577) and refused(depth=24576) is None
    assert refused(depth=49152, dtype=torch.bfloat16) is None
    assert "its scales take 101376 bytes" in refused(depth=24576, group=32, inputs="symmetric")
    reason = cuda.CUDA_INT8_LINEAR.unsupported(torch.zeros(1))
    assert re.search("no CUDA part" if not extension._C.cuda_architectures else "CUDA|cpu", reason)


@pytest.mark.skipif(compilers.NVCC is None, reason=compilers.NO_NVCC)
@pytest.mark.parametrize("architecture", ["80", "90"])
@pytest.mark.parametrize("source", SOURCES, ids=[s.stem for s in SOURCES])
def test_compiled_by_nvcc(source, architecture, tmp_path):
    """No spills, and no more registers than let the blocks that the design counts on run on a processor."""
    command = [compilers.NVCC, f"-arch=sm_{architecture}", "-std=c++17", "-O3", "-cubin", "-Xptxas", "-v"]
    command += [str(source), "-o", str(tmp_path / "x.cubin")]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", told)]
    assert spills and max(spills) == 0, told
    registers = dict(re.findall(r"Compiling entry function '(\w+)'.*?Used (\d+) registers", told, re.DOTALL))
    most = {"quantize": 40, "few_rows": 168, "Li64ELNS_6DigitsE0": 128, "Li128ELNS_6DigitsE0": 128, "tiles": 255}
    for kernel, used in registers.items():
        assert int(used) <= next(n for part, n in most.items() if part in kernel), (kernel, used)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_on_the_gpu(scheme):
    for shape in (*SHAPES.values(), (300, 1024, 768)):
        kw = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in SCHEMES[scheme].items()}
        arguments = [t.cuda() for t in of_scheme(shape, torch.bfloat16, SCHEMES[scheme])]
        with backend.use("cuda"):
            out = op.int8_linear(*arguments, **kw)
        torch.testing.assert_close(out, plain(*arguments, **kw))
