"""The CUDA kernels of this family: their sources run on the CPU, and compiled by nvcc for real targets."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from llmkern import backend, extension
from llmkern.positional import cuda, op, reference
from llmkern.random import philox_words
from llmkern.verify import verify
from tests.emulation import cuda_on_cpu
from tests.positional.cases import (
    FLOATS,
    ROTARY,
    ROTARY_LAYOUTS,
    SINUSOIDAL,
    add,
    apart,
    rotary_inputs,
    rotate,
    sinusoidal_inputs,
)

LAYOUTS = pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    if cuda_on_cpu.compiler() is None:
        pytest.skip("there is no C++ compiler")
    return cuda_on_cpu.build(tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def on_cpu(module, monkeypatch):
    """Calls of this family are served by the CUDA backends, whose kernels run on the CPU."""
    monkeypatch.setattr("llmkern.cuda.kernel", lambda name: getattr(module, name))
    monkeypatch.setattr("llmkern.cuda.stream", lambda device: (0, 0))
    for operator, kernel in (
        (backend.Operator.all["sinusoidal_add"], cuda.CUDA_SINUSOIDAL_ADD),
        (backend.Operator.all["sinusoidal_dropout"], cuda.CUDA_SINUSOIDAL_DROPOUT),
        (backend.Operator.all["rotary"], cuda.CUDA_ROTARY),
    ):
        served = backend.Backend("cuda", kernel.plan, lambda *args: None)
        monkeypatch.setattr(operator, "by_device", {**operator.by_device, "cpu": [served]})
    backend.forget_plans()
    yield
    backend.forget_plans()


@LAYOUTS
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", ROTARY.values(), ids=ROTARY)
def test_rotary(shape, dtype, interleaved, on_cpu):
    inputs = rotary_inputs(shape, dtype)
    q, k = (t if t is None else t.requires_grad_() for t in inputs[:2])  # the backward is the inverse rotation
    verify(rotate(interleaved), rotate(interleaved, plain=True), (q, k, *inputs[2:])).raise_if_failed()


@LAYOUTS
def test_rotary_with_many_items(interleaved, on_cpu):
    """Past 2**17 items, from where on one takes four heads; the second of the two has the fifth head alone."""
    inputs = rotary_inputs((16, 3, 2, 4100, 2, 2), torch.float32)
    functions = rotate(interleaved), rotate(interleaved, plain=True)
    verify(*functions, inputs, gradients=False).raise_if_failed()


@LAYOUTS
@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_rotary_positions(interleaved, integers, on_cpu):
    q, k, cos, sin = rotary_inputs((2, 3, 1, 6, 40, 32), torch.float32)
    for ids in (torch.randint(0, 11, (6,)), torch.randint(0, 11, (2, 6))):
        functions = (rotate(interleaved, ids.to(integers), plain=plain) for plain in (False, True))
        verify(*functions, (q, k, cos, sin), gradients=False).raise_if_failed()
    out = rotate(interleaved, torch.tensor([0, 1, 11, -1, 2, 3], dtype=integers))(q, k, cos, sin)[0]
    assert out[:, :, 2:4, :32].isnan().all() and not out[:, :, [0, 1, 4, 5]].isnan().any()
    assert torch.equal(out[..., 32:], q[..., 32:])


@LAYOUTS
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", ROTARY_LAYOUTS.values(), ids=ROTARY_LAYOUTS)
def test_rotary_strides_and_in_place(layout, dtype, interleaved, on_cpu):
    q, k, cos, sin = rotary_inputs((2, 4, 2, 9, 48, 32), dtype)
    expected = rotate(interleaved)(q, k, cos, sin)
    a, b = layout(q), layout(k)
    for x, y in zip(rotate(interleaved)(a, b, cos, sin), expected, strict=True):
        assert torch.equal(x, y)
    op.rotary(a, b, cos, sin, interleaved=interleaved, inplace=True)
    assert torch.equal(a, expected[0]) and torch.equal(b, expected[1])


@LAYOUTS
@pytest.mark.parametrize("which", range(4), ids=["q", "k", "cos", "sin"])
def test_rotary_every_tensor_has_strides_of_its_own(which, interleaved, on_cpu):
    """Each alone in another layout: one that is not aligned keeps the kernel of wide accesses away from all."""
    inputs = list(rotary_inputs((2, 4, 2, 8, 48, 32), torch.bfloat16))  # 8 rows apart by any step are aligned again
    expected, own = rotate(interleaved)(*inputs), inputs[which]
    for name, layout in ROTARY_LAYOUTS.items():
        inputs[which] = layout(own) if own.dim() == 4 else layout(own[None, None])[0, 0]
        for x, y in zip(rotate(interleaved)(*inputs), expected, strict=True):
            assert torch.equal(x, y), name


@LAYOUTS
def test_rotary_of_aligned_rows_to_rows_that_are_not(interleaved, on_cpu):
    q, k, cos, sin = rotary_inputs((2, 4, 2, 9, 50, 32), torch.bfloat16)
    expected = rotate(interleaved)(q, k, cos, sin)
    for a, b in ((apart(q, 6), apart(k, 6)), (apart(q, 6), k), (q, apart(k, 6))):
        for x, y in zip(rotate(interleaved)(a, b, cos, sin), expected, strict=True):
            assert torch.equal(x, y)


def test_rotary_one_of_the_two_in_place(module):
    """What is not rotated is copied where one of the two outputs is no input."""
    q, k, cos, sin = rotary_inputs((1, 2, 3, 5, 48, 32), torch.float32)
    expected = rotate(plain=True)(q, k, cos, sin)
    rows = [*q.stride()[:3], *k.stride()[:3]] * 2
    for in_place in (0, 1):
        ins = [q.clone(), k.clone()]
        outs = [x if i == in_place else torch.full_like(x, torch.nan) for i, x in enumerate(ins)]
        sizes, strides = [1, 2, 3, 5, 48, 32, len(cos)], [*rows, cos.stride(0), sin.stride(0), 0, 0]
        plan = extension._C.RotaryPlan(sizes, strides, [extension.DTYPE_CODES[torch.float32]] * 2 + [0], False, False)
        module.rotary_cuda(plan, *(t.data_ptr() for t in (*ins, *outs, cos, sin)), 0, 0, 0)
        for x, y in zip(outs, expected, strict=True):
            torch.testing.assert_close(x, y)


def test_rotary_tables_in_the_dtype_of_q(on_cpu):
    for dtype in (torch.bfloat16, torch.float16):
        q, k, cos, sin = rotary_inputs(ROTARY["usual"], dtype)
        inputs = (q, k, cos.to(dtype), sin.to(dtype))
        verify(rotate(), rotate(plain=True), inputs, gradients=False).raise_if_failed()


def test_rotary_writes_nothing_outside(on_cpu):
    q, k, cos, sin = rotary_inputs((1, 3, 2, 2, 10, 6), torch.float32)
    room = torch.full((1, 5, 4, 16), 7.0)
    inside = room[:, 1:4, 1:3, 3:13]
    inside.copy_(q)
    op.rotary(inside, k, cos, sin, inplace=True)
    inside.fill_(7.0)
    assert (room == 7.0).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [*SINUSOIDAL.values(), (40, 30, 128)], ids=[*SINUSOIDAL, "many items"])
def test_sinusoidal_add(shape, dtype, on_cpu):
    for arguments in ({}, {"scale": 11.3}, {"scale": 2.0, "dropout_p": 0.3, "seed": 2**40 + 9}):
        verify(add, reference.sinusoidal_add, sinusoidal_inputs(shape, dtype), arguments).raise_if_failed()


def test_the_dropout_mask_is_the_cpus(on_cpu):
    x, pe = torch.ones(23, 5, 50), torch.zeros(23, 1, 50)
    for seed in (0, -1, 2**62 + 11):
        kept = op.sinusoidal_add(x, pe, dropout_p=0.4, seed=seed) != 0
        assert torch.equal(kept, reference.dropout_factor(x, 0.4, seed) != 0)
    assert op.sinusoidal_add(x, pe, dropout_p=1.0, seed=1).abs().max() == 0


def test_dropout_at_the_threshold(on_cpu):
    """A random word that equals the threshold keeps its element."""
    x, pe, seed = torch.ones(2, 1, 4), torch.zeros(2, 1, 4), 7
    for row in range(2):
        counter = (torch.tensor(0), torch.tensor(row), torch.tensor(0), torch.tensor(0))
        for element, word in enumerate(philox_words(counter, seed).tolist()):
            for dropout_p, kept in ((word / 2**32, True), ((word + 1) / 2**32, False)):
                out = op.sinusoidal_add(x, pe, dropout_p=dropout_p, seed=seed)
                assert (out[row, 0, element] != 0) == kept
                assert torch.equal(out != 0, reference.dropout_factor(x, dropout_p, seed) != 0)


def test_sinusoidal_add_strides(on_cpu):
    for width in (24, 22):
        x, pe = sinusoidal_inputs((9, 4, width), torch.float32)
        expected = op.sinusoidal_add(x, pe)
        shifted = ROTARY_LAYOUTS["misaligned"]
        for strided, table in (
            (x.transpose(0, 1).contiguous().transpose(0, 1), pe),
            (x.permute(2, 0, 1).contiguous().permute(1, 2, 0), pe),
            (shifted(x), pe),
            (x, shifted(pe)),
            (apart(x, 3), pe),
            (x, apart(pe, 3)),
            (apart(x, 8 - width % 8), apart(pe, 8 - width % 8)),  # only the output's rows are not aligned
        ):
            assert torch.equal(op.sinusoidal_add(strided, table), expected)


def test_another_device_is_an_error(module):
    x, pe = sinusoidal_inputs((1, 1, 4), torch.float32)
    args = (1, 1, 4, 4, 4, 4, 4, 4, 1.0, 0)
    with pytest.raises(RuntimeError, match="sinusoidal_add: the launch on CUDA device 3 failed"):
        module.sinusoidal_add_cuda(x.data_ptr(), pe.data_ptr(), x.data_ptr(), *args, 3, 0, 0, 1.0, 0)


def test_why_it_cannot_serve_here():
    reason = cuda.CUDA_ROTARY.unsupported(torch.zeros(1))
    expected = "no CUDA part" if not extension._C.cuda_architectures else "CUDA|cpu"
    assert re.search(expected, reason)


NVCC = shutil.which("nvcc")


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc to compile with")
@pytest.mark.parametrize("architecture", ["80", "90", "100", "120"])
def test_compiled_by_nvcc(architecture, tmp_path):
    """No spills and few registers; where all is aligned, loads and stores of 16 bytes, elsewhere none."""
    ptx = tmp_path / "cuda.ptx"
    source, flags = str(ROOT / "csrc/positional/cuda.cu"), [f"-arch=sm_{architecture}", "-std=c++17", "-O3"]
    subprocess.run([NVCC, *flags, "-ptx", source, "-o", str(ptx)], check=True)
    assembled = ["ptxas", "-v", f"-arch=sm_{architecture}", str(ptx), "-o", str(tmp_path / "cuda.cubin")]
    told = subprocess.run(assembled, capture_output=True, text=True, check=True).stderr
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", told)]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", told)]
    assert len(registers) == 26 and spills and max(spills) == 0 and max(registers) <= 80, told
    kernels = re.split(r"\.entry ", ptx.read_text())[1:]
    assert len(kernels) == 26
    for kernel in kernels:
        name = kernel.split("(", 1)[0]
        for access in ("ld", "st"):
            wide = re.findall(rf"\b{access}\.global\.\S*v4\.[ubf]32", kernel)
            assert bool(wide) == name_says_aligned(name), (name, access)


def name_says_aligned(name: str) -> bool:
    """The last template argument of a mangled kernel name: Lb1E is true."""
    return "Lb1EE" in name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", FLOATS)
def test_on_the_gpu(dtype):
    for shape in SINUSOIDAL.values():
        inputs = [t.cuda() for t in sinusoidal_inputs(shape, dtype)]
        arguments = {"scale": 2.0, "dropout_p": 0.3, "seed": 5}
        with backend.use("cuda"):
            out = add(*inputs, **arguments)
        expected = reference.sinusoidal_add(*inputs, **arguments)
        torch.testing.assert_close(out, expected)
    for shape in ROTARY.values():
        inputs = [None if t is None else t.cuda() for t in rotary_inputs(shape, dtype)]
        for interleaved in (False, True):
            with backend.use("cuda"):
                out = rotate(interleaved)(*inputs)
            for x, y in zip(out, rotate(interleaved, plain=True)(*inputs), strict=True):
                torch.testing.assert_close(x, y)
