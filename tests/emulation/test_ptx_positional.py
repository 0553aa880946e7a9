"""The positional kernels' PTX, of csrc/positional/cuda.cu and of the Triton kernel, against the references."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

from llmkern.extension import DTYPE_CODES
from llmkern.positional import reference, triton_launch
from llmkern.verify import verify
from tests.emulation import compilers, triton_on_ptx
from tests.emulation.ptx.launch import Buffer, Launch, find, run
from tests.positional.cases import FLOATS, ROTARY, SINUSOIDAL, rotary_inputs, sinusoidal_inputs

SOURCE = compilers.ROOT / "csrc/positional/cuda.cu"
THREADS = 128
needs_nvcc = pytest.mark.skipif(compilers.NVCC is None, reason=compilers.NO_NVCC)
MANGLED = {torch.float32: "f", torch.bfloat16: "NS_4Bf16E", torch.float16: "NS_4Fp16E"}
NUMPY = {torch.float32: np.float32, torch.bfloat16: np.uint16, torch.float16: np.float16, torch.int64: np.int64}
LAYOUTS = pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
ARCHITECTURES = ["80", "90"]


def bits(x: torch.Tensor) -> np.ndarray:
    """A tensor's numbers for numpy, which has no bfloat16."""
    x = x.contiguous()
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def tensor(x: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    out = torch.from_numpy(x.copy())
    return out.view(torch.bfloat16) if like.dtype == torch.bfloat16 else out


def out_like(x: torch.Tensor, offset: int = 0) -> Buffer:
    return Buffer(np.zeros(tuple(x.shape), NUMPY[x.dtype]), "out", written=False, offset=offset)


def sinusoidal(
    architecture: str, scale: float, dropout: float, seed: int, aligned: bool, schedule: str,
    blocks: int | None = None, counts: list | None = None,
):  # fmt: skip
    """A function of (x, pe) that runs the kernel's PTX; not aligned: the other kernel, on addresses that fit.

    blocks: fewer than there is work for, whose threads go on with more; then x is overwritten by the result, so that
    whatever is done twice is seen. counts: takes what the launch moved.
    """

    def function(x, pe):
        length, batch, width = x.shape
        launch, offset = Launch(), 0 if aligned else x.element_size()
        per = 16 // x.element_size()
        items = length * batch * -(-width // per)
        given = Buffer(bits(x).copy(), "x", offset=offset, read_only=blocks is None)
        where = launch.address(given)
        out = out_like(x, offset) if blocks is None else given
        out_where = where if out is given else launch.address(out)
        drop, keep = (reference.drop_below(dropout), 1 / (1 - dropout)) if dropout else (0, 1.0)
        arguments = struct.pack(
            "<QQQqqqqqqqqfiiIf4xQ", where, launch.address(bits(pe), "pe"), out_where,
            length, batch, width, batch * width, width, width, batch * width, width, scale, DTYPE_CODES[x.dtype], 0,
            drop, keep, seed,
        )  # fmt: skip
        ptx = compilers.nvcc(SOURCE, architecture)
        name = find(ptx, f"sinusoidal_add_kernelI{MANGLED[x.dtype]}Lb{int(aligned)}E")
        report = run(
            ptx, name, blocks or -(-items // THREADS), THREADS, [arguments, items], launch=launch, schedule=schedule,
            counts=counts is not None,
        )  # fmt: skip
        report.raise_if_faulty()
        if counts is not None:
            counts.append(report.counts)
        return tensor(out.data, x)

    return function


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_sinusoidal_add(dtype, architecture):
    for name, shape in SINUSOIDAL.items():
        if 0 in shape:
            continue
        for aligned in (True, False):
            if aligned and shape[2] % 8:
                continue
            x, pe = sinusoidal_inputs(shape, dtype)
            pe = pe[: shape[0]]
            for dropout, schedule in ((0.0, "lockstep"), (0.3, "reverse")):
                arguments = {"scale": 2.5, "dropout_p": dropout, "seed": 2**40 + 9}
                kernel = sinusoidal(architecture, 2.5, dropout, 2**40 + 9, aligned, schedule)
                report = verify(kernel, lambda x, pe, a=arguments: reference.sinusoidal_add(x, pe, **a), (x, pe), gradients=False)  # fmt: skip  # noqa: E501
                assert report, (name, str(report))


@needs_nvcc
def test_sinusoidal_add_of_more_items_than_threads():
    for dtype, shape, aligned in ((torch.float32, (37, 4, 21), False), (torch.bfloat16, (37, 4, 40), True)):
        kernel = sinusoidal("80", 2.5, 0.3, 2**40 + 9, aligned, "lockstep", blocks=2)
        x, pe = sinusoidal_inputs(shape, dtype)
        verify(
            kernel, lambda x, pe: reference.sinusoidal_add(x, pe, 2.5, 0.3, 2**40 + 9), (x, pe[:37]), gradients=False
        ).raise_if_failed()


def rotary(
    architecture: str, interleaved: bool, aligned: bool, inverse: bool, positions=None, heads: int = 1,
    blocks: int | None = None, counts: list | None = None,
):  # fmt: skip
    """A function of (q, k, cos, sin); heads: that an item of the kernel's work takes; blocks, counts: as above."""

    def function(q, k, cos, sin):
        batch, q_heads, length, width = q.shape
        kv_heads = 0 if k is None else k.shape[1]
        k = q if k is None else k
        launch, offset = Launch(), 0 if aligned else q.element_size()
        per, half = 16 // q.element_size(), cos.shape[1]
        place = lambda x, name: Buffer(bits(x).copy(), name, offset=offset, read_only=blocks is None)  # noqa: E731
        given = place(q, "q"), place(k, "k")
        out, k_out = (out_like(q, offset), out_like(k, offset)) if blocks is None else given
        addresses = [launch.address(x) for x in given]
        addresses += [launch.address(x) for x in (out, k_out)] if blocks is None else addresses
        strides = lambda n: (n * length * width, length * width, width)  # noqa: E731
        rows = (strides(q_heads), strides(kv_heads or q_heads)) * 2
        where = 0 if positions is None else launch.address(positions.numpy(), "positions")
        packed = struct.pack(
            "<7Q7q12q4q3i??2xi4x", *addresses,
            launch.address(bits(cos), "cos"), launch.address(bits(sin), "sin"), where, batch, q_heads, kv_heads, length,
            width, 2 * half, cos.shape[0], *sum(rows, ()), half, half, length, 1, DTYPE_CODES[q.dtype],
            DTYPE_CODES[torch.float32], DTYPE_CODES[torch.int64], interleaved, inverse, 0,
        )  # fmt: skip
        rotated = -(-half // per)
        groups = rotated + -(-(width - 2 * half) // per)
        chunks = -(-(q_heads + kv_heads) // heads)
        work = struct.pack("<5q", rotated, groups, heads, chunks, batch * chunks * length * groups)
        ptx = compilers.nvcc(SOURCE, architecture)
        name = find(ptx, f"rotary_kernelI{MANGLED[q.dtype]}fLb{int(interleaved)}ELb{int(aligned)}E")
        count = blocks or -(-batch * chunks * length * groups // THREADS)
        report = run(ptx, name, count, THREADS, [packed, work], launch=launch, counts=counts is not None)
        report.raise_if_faulty()
        if counts is not None:
            counts.append(report.counts)
        return (tensor(out.data, q), tensor(k_out.data, k)) if kv_heads else (tensor(out.data, q),)

    return function


def plain(interleaved, inverse=False, positions=None):
    def function(q, k, cos, sin):
        sin = -sin if inverse else sin
        outputs = reference.rotary(q, k, cos, sin, interleaved=interleaved, position_ids=positions)
        return outputs if k is not None else outputs[:1]

    return function


@needs_nvcc
@LAYOUTS
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_rotary(dtype, architecture, interleaved):
    for name, shape in ROTARY.items():
        batch, _, _, length, width, rotated = shape
        if not (batch and length):
            continue
        per = 16 // torch.empty(0, dtype=dtype).element_size()
        for aligned in (True, False):
            if aligned and (width % per or rotated // 2 % per):
                continue
            inputs = rotary_inputs(shape, dtype)
            kernel = rotary(architecture, interleaved, aligned, aligned, heads=1 if aligned else 4)
            report = verify(kernel, plain(interleaved, aligned), inputs, gradients=False)
            assert report, (name, str(report))


@needs_nvcc
@LAYOUTS
def test_rotary_of_more_items_than_threads(interleaved):
    inputs = rotary_inputs((2, 4, 2, 9, 48, 48), torch.bfloat16)
    kernel = rotary("80", interleaved, True, False, blocks=2)
    verify(kernel, plain(interleaved), inputs, gradients=False).raise_if_failed()


@needs_nvcc
@LAYOUTS
def test_rotary_positions(interleaved):
    inputs = rotary_inputs((2, 3, 1, 6, 40, 32), torch.bfloat16)
    positions = torch.randint(0, 11, (2, 6))
    kernel = rotary("80", interleaved, True, False, positions)
    verify(kernel, plain(interleaved, positions=positions), inputs, gradients=False).raise_if_failed()
    q = rotary("80", interleaved, True, False, torch.tensor([[0, 1, 11, -1, 2, 3]] * 2))(*inputs)[0]
    assert q[:, :, 2:4, :32].isnan().all() and not q[:, :, [0, 1, 4, 5]].isnan().any()


@needs_nvcc
@LAYOUTS
@pytest.mark.parametrize("dtype", FLOATS)
def test_traffic(dtype, interleaved):
    """Each byte is read and written once, 16 at a time; what the tables and encodings add, rows and heads share."""
    counts: list = []
    x, pe = sinusoidal_inputs((6, 4, 128), dtype)
    sinusoidal("80", 2.0, 0.3, 5, True, "lockstep", counts=counts)(x, pe[:6])
    q, k, cos, sin = rotary_inputs((2, 6, 2, 8, 128, 128), dtype)
    rotary("80", interleaved, True, False, heads=4, counts=counts)(q, k, cos, sin)
    moved = x.nbytes, q.nbytes + k.nbytes
    shared = pe[:6].nbytes, cos[:8].nbytes + sin[:8].nbytes
    for found, floor, tables in zip(counts, moved, shared, strict=True):
        assert found.touched[0] * 32 == floor + tables and found.touched[1] * 32 == floor
        assert all(".v4" in site.text for site in found.sites if site.space == "global")
    halves = 2 if interleaved else 1  # pairs side by side: a thread's two accesses are halves of the same sectors
    assert [c.sectors[1] * 32 for c in counts] == [moved[0], halves * moved[1]]


@LAYOUTS
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_of_triton(dtype, capability, interleaved):
    pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux)")
    from llmkern.positional.triton_kernels import rotary_kernel

    for shape in ((2, 6, 2, 5, 80, 64), (1, 3, 3, 4, 37, 22)):
        _, heads, _, _, width, rotated = shape
        half, kind = rotated // 2, {torch.float32: "*fp32", torch.bfloat16: "*bf16"}[dtype]
        constants = triton_launch.constants(width, half, heads, interleaved, False, False, False)
        pointers = {n: kind for n in ("q", "k", "q_out", "k_out")} | {n: "*fp32" for n in ("cos", "sin")}
        types = {n: pointers.get(n, "*i64" if n == "position_ids" else "i32") for n in rotary_kernel.arg_names}
        kernel = compilers.triton(rotary_kernel, types, constants, capability, enable_fp_fusion=True)

        def function(q, k, cos, sin, kernel=kernel, constants=constants):
            outs = out_like(q), out_like(k)
            per, strides = constants["HEADS"], [x.stride()[:3] for x in (q, k, q, k)]
            grid = (q.shape[2], q.shape[0], -(-q.shape[1] // per) + -(-k.shape[1] // per))
            arguments = [
                bits(q), bits(k), *outs, bits(cos), bits(sin), 0, q.shape[1], k.shape[1], q.shape[3], cos.shape[0],
                *sum(strides, ()), cos.stride(0), sin.stride(0), 0, 0,
            ]  # fmt: skip
            kernel.run(grid, arguments).raise_if_faulty()
            return tensor(outs[0].data, q), tensor(outs[1].data, k)

        inputs = rotary_inputs(shape, dtype)
        verify(function, plain(interleaved), inputs, gradients=False).raise_if_failed()


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinusoidal_add_of_triton(dtype, capability):
    pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux)")
    emulated, seed = triton_on_ptx.Emulated(capability), torch.tensor(2**62 + 5)
    for shape, p in (((3, 2, 37), 0.25), ((2, 1, 1030), 0.0), ((5, 3, 64), 0.5)):
        options = {"scale": 2.0, "dropout_p": p, "seed": seed}

        def function(x, pe, scale, dropout_p, seed):
            return triton_launch.sinusoidal_add(emulated, x, pe, seed, scale, dropout_p)

        inputs = sinusoidal_inputs(shape, dtype)
        verify(function, reference.sinusoidal_add, inputs, options, gradients=False).raise_if_failed()
    assert len(emulated.reports) >= 3
