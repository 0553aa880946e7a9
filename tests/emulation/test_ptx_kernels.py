"""Whole kernels of tests/emulation/ptx_kernels under every schedule, and faults planted in them, to be found."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from tests.emulation import compilers
from tests.emulation.ptx.launch import Buffer, EmulationError, TensorMap, empty, run, run_schedules
from tests.emulation.ptx.machine import SCHEDULES

needs_nvcc = pytest.mark.skipif(compilers.NVCC is None, reason=compilers.NO_NVCC)
ALL = pytest.mark.parametrize("schedule", SCHEDULES)
REDUCE, MMA, WGMMA = (compilers.KERNELS / f"{name}.cu" for name in ("reduce", "gemm_mma", "gemm_wgmma"))
Changes = tuple[tuple[str, str], ...]


class Wrong(AssertionError):
    """The result is not the expected one."""


def close(got: np.ndarray, expected: np.ndarray, relative: float) -> None:
    """Errors up to `relative` of the largest expected number."""
    if not np.isfinite(got).all() or np.abs(got - expected).max() > relative * np.abs(expected).max():
        raise Wrong


def to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 cut off to bfloat16."""
    return (np.ascontiguousarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def of_bf16(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def softmax(schedule: str = "lockstep", changes: Changes = ()) -> None:
    x = np.random.default_rng(0).standard_normal((37, 77)).astype(np.float32) * 3
    out = empty(x.shape, np.float32)
    ptx = compilers.nvcc(REDUCE, "80", changes)
    run(ptx, "softmax_rows", 10, 128, [x, out, *x.shape], schedule=schedule).raise_if_faulty()
    weight = np.exp(x.astype(float) - x.max(1, keepdims=True))
    close(out.data, weight / weight.sum(1, keepdims=True), 1e-6)


def sum_blocks(schedule: str = "lockstep", changes: Changes = ()) -> None:
    x = np.random.default_rng(0).integers(-999, 999, 5000).astype(np.int32)
    out, blocks = np.zeros(2, np.int32), np.zeros(1, np.uint32)
    ptx = compilers.nvcc(REDUCE, "80", changes)
    run(
        ptx, "sum_blocks", 7, 128, [Buffer(x, read_only=True), out, len(x), blocks], schedule=schedule
    ).raise_if_faulty()
    parts = [sum(int(v) for i, v in enumerate(x) if i // 128 % 7 == b) for b in range(7)]
    if list(out) != [x.sum(), max(0, *parts)] or blocks[0] != 7:
        raise Wrong


def sum_by_the_last(schedule: str = "lockstep", changes: Changes = ()) -> None:
    x = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    parts, finished, out = empty(7, np.float32), np.zeros(1, np.uint32), empty(1, np.float32)
    ptx = compilers.nvcc(REDUCE, "80", changes)
    arguments = [x, parts, finished, out, len(x)]
    run(ptx, "sum_by_the_last", 7, 128, arguments, schedule=schedule, threads_at_once=256).raise_if_faulty()
    close(out.data, np.array([float(sum(map(Fraction, x.tolist())))]), 1e-5)


def product(name: str, schedule: str = "lockstep", changes: Changes = (), m: int = 100, n: int = 130, k: int = 208):
    """gemm_bf16, gemm_s8 or gemm_f16 with these sizes."""
    rng = np.random.default_rng(0)
    if name == "gemm_s8":
        a, b = (rng.integers(-128, 128, (rows, k)).astype(np.int8) for rows in (m, n))
        c, exact = empty((m, n), np.int32), a.astype(float) @ b.astype(float).T
    else:
        a, b = (rng.standard_normal((rows, k)).astype(np.float32) for rows in (m, n))
        a, b = (to_bf16(x) if name == "gemm_bf16" else x.astype(np.float16) for x in (a, b))
        numbers = [of_bf16(x) if name == "gemm_bf16" else x.astype(float) for x in (a, b)]
        c, exact = empty((m, n), np.float32), numbers[0] @ numbers[1].T
    grid = (-(-n // 64), -(-m // 64))
    if name == "gemm_f16":
        ptx, threads, shared = compilers.nvcc(WGMMA, "90a", changes), 160, 4 * 8192
        a, b = (TensorMap(x, (64, 64), 128) for x in (a, b))
    else:
        ptx, threads, shared = compilers.nvcc(MMA, "80", changes), 128, 0
    report = run(ptx, name, grid, threads, [a, b, c, m, n, k], shared_bytes=shared, schedule=schedule)
    report.raise_if_faulty()
    close(c.data, exact, 0 if name == "gemm_s8" else 1e-6)


@needs_nvcc
@ALL
def test_reductions(schedule):
    softmax(schedule)
    sum_blocks(schedule)
    sum_by_the_last(schedule)


@needs_nvcc
@ALL
@pytest.mark.parametrize("name", ["gemm_bf16", "gemm_s8", "gemm_f16"])
def test_products(name, schedule):
    product(name, schedule)
    product(name, schedule, m=1, n=65, k=64)


@needs_nvcc
def test_products_of_256():
    for name in ("gemm_bf16", "gemm_s8", "gemm_f16"):
        product(name, m=256, n=256, k=256)


@needs_nvcc
def test_the_same_bits_under_every_schedule():
    x = np.random.default_rng(0).standard_normal((9, 77)).astype(np.float32)
    ptx = compilers.nvcc(REDUCE, "80")
    found = run_schedules(
        ptx, "softmax_rows", 3, 128, lambda: [x, empty(x.shape, np.float32), 9, 77], lambda a: [a[1].data]
    )
    assert found == []


# Faults: (what runs, old, new) of the source.
FAULTS = [
    (softmax, "i < width; i += 32) most", "i <= width; i += 32) most"),
    (softmax, "if (row >= rows) return;", ""),
    (softmax, "most, step));", "most, step / 2));"),
    (softmax, "for (int i = lane; i < width; i += 32) out[i]", "for (int i = lane; i < width - 1; i += 32) out[i]"),
    (sum_blocks, "  part[threadIdx.x] = sum;\n  __syncthreads();", "  part[threadIdx.x] = sum;"),
    (sum_blocks, "part[threadIdx.x + step];\n    __syncthreads();", "part[threadIdx.x + step];"),
    (sum_blocks, "if (threadIdx.x < step) part", "if (threadIdx.x <= step) part"),
    (sum_blocks, "    atomicAdd(out, part[0]);", "    out[0] += part[0];"),
    (sum_blocks, "    __syncthreads();\n  }\n  if (threadIdx.x == 0) {\n    atomicAdd",
     "    if (threadIdx.x < 96) __syncthreads();\n  }\n  if (threadIdx.x == 0) {\n    atomicAdd"),
    (sum_by_the_last, "    __threadfence();\n    last", "    last"),
    (sum_by_the_last, "    last = atomicAdd(finished, 1u) == gridDim.x - 1;\n  }\n  __syncthreads();",
     "    last = atomicAdd(finished, 1u) == gridDim.x - 1;\n  }"),
    ("gemm_bf16", "cp.async.wait_group 1;", "cp.async.wait_group 2;"),
    ("gemm_bf16", "cp.async.wait_group 0;", "cp.async.wait_group 1;"),
    ("gemm_bf16", "    __syncthreads();\n    uint32_t at", "    uint32_t at"),
    ("gemm_bf16", "    }\n    __syncthreads();\n  }", "    }\n  }"),
    ("gemm_bf16", "(c ^ (r / 2 % 4))", "(c ^ (r % 4 * 2))"),
    ("gemm_bf16", "lane / 16 * 8 + lane % 8", "lane / 8 * 8 + lane % 8"),
    ("gemm_bf16", "place(warp * 16 + lane % 16", "place(warp * 16 + lane % 8"),
    ("gemm_bf16", "first + r < rows &&", "first + r <= rows &&"),
    ("gemm_bf16", "multiply(sums[2 * j], x, y[0], y[1]);", "multiply(sums[2 * j], x, y[0], y[2]);"),
    ("gemm_s8", "bool inside = first + r < rows && k + c * 16 < row_bytes;", "bool inside = first + r < rows;"),
    ("gemm_s8", "if (i < m && o < n) c", "if (o < n) c"),
    ("gemm_s8", "lane / 4 + e / 2 * 8", "lane / 4 + e % 2 * 8"),
    ("gemm_f16", "wgmma.wait_group.sync.aligned 0;", "wgmma.wait_group.sync.aligned 1;"),
    ("gemm_f16", "    wait(shared_address(full + s), i / kStages % 2);\n", ""),
    ("gemm_f16", "if (i >= kStages) wait(shared_address(empty + s), (i / kStages - 1) % 2);", ""),
    ("gemm_f16", "(i / kStages - 1) % 2", "i / kStages % 2"),
    ("gemm_f16", "uint64_t{1024 >> 4} << 32", "uint64_t{512 >> 4} << 32"),
    ("gemm_f16", '"r"(barrier), "r"(2 * kTileBytes)', '"r"(barrier), "r"(kTileBytes)'),
    ("gemm_f16", "descriptor(at + 32 * j)", "descriptor(at + 16 * j)"),
    ("gemm_f16", "  __syncthreads();\n  if (threadIdx.x >= 128) {", "  if (threadIdx.x >= 128) {"),
]  # fmt: skip


@needs_nvcc
@pytest.mark.parametrize("what,old,new", FAULTS)
def test_planted_faults_are_found(what, old, new):
    changes = ((old, new),)
    with pytest.raises((Wrong, EmulationError)):
        for schedule in SCHEDULES:
            if isinstance(what, str):
                product(what, schedule, changes)
            else:
                what(schedule, changes)


@needs_nvcc
def test_a_fault_is_found_where_it_is():
    with pytest.raises(EmulationError, match=r"out of bounds.* of argument 0 .*PTX line \d+ \(reduce.cu:\d+\)"):
        softmax(changes=(("i < width; i += 32) most", "i <= width; i += 32) most"),))
    with pytest.raises(EmulationError, match=r"missing wait: .*cp\.async of thread \d+.*gemm_mma\.cu"):
        product("gemm_bf16", changes=(("cp.async.wait_group 0;", "cp.async.wait_group 1;"),))


# ---- Triton's


def attended(q, k, v, causal):
    score = q.astype(float) @ k.astype(float).transpose(0, 2, 1) / q.shape[-1] ** 0.5
    if causal:
        score = np.where(np.tril(np.ones(score.shape[1:], bool)), score, -np.inf)
    weight = np.exp(score - score.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True) @ v.astype(float)


@pytest.mark.parametrize("capability", [80, 90])
def test_triton_attention(capability):
    pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux)")
    from tests.emulation.ptx_kernels import triton_kernels

    rng = np.random.default_rng(0)
    for causal, length in ((False, 256), (True, 200)):
        constants = {"WIDTH": 64, "BM": 64, "BN": 64, "CAUSAL": causal}
        types = {n: "*fp16" for n in ("q", "k", "v", "out")} | {"length": "i32", "scale": "fp32"}
        compiled = compilers.triton(triton_kernels.attention, types, constants, capability, divisible=list(types)[:4])
        q, k, v = (rng.standard_normal((2, length, 64)).astype(np.float16) for _ in range(3))
        out = empty(q.shape, np.float16)
        scale = 1.4426950408889634 / 8
        compiled.run((-(-length // 64), 2), [q, k, v, out, length, scale]).raise_if_faulty()
        close(out.data.astype(float), attended(q, k, v, causal), 1e-3)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("t,dtype", [("fp16", np.float16), ("i8", np.int8), ("fp32", np.float32)])
def test_triton_products(t, dtype, capability):
    pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux)")
    from tests.emulation.ptx_kernels import triton_kernels

    rng = np.random.default_rng(0)
    m, n, k = 100, 144, 208
    a, b = (rng.standard_normal(shape) * (30 if t == "i8" else 1) for shape in ((m, k), (k, n)))
    a, b = a.astype(dtype), b.astype(dtype)
    c = empty((m, n), np.int32 if t == "i8" else np.float32)
    types = {"a": f"*{t}", "b": f"*{t}", "c": "*i32" if t == "i8" else "*fp32", "m": "i32", "n": "i32", "k": "i32"}
    constants = {"BM": 64, "BN": 64, "BK": 64 if t == "i8" else 32}
    compiled = compilers.triton(triton_kernels.product, types, constants, capability, divisible="abcnk")
    compiled.run((2, 3), [a, b, c, m, n, k]).raise_if_faulty()
    # float32 goes through tf32 with 10 bits of mantissa.
    close(c.data.astype(float), a.astype(float) @ b.astype(float), {"fp32": 2e-3, "i8": 0, "fp16": 1e-6}[t])


@pytest.mark.parametrize("schedule", ["lockstep", "random"])
def test_triton_descriptors_and_softmax(schedule):
    pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux)")
    from tests.emulation.ptx_kernels import triton_kernels

    rng = np.random.default_rng(0)
    m, n, k = 128, 192, 256
    a, b = rng.standard_normal((m, k)).astype(np.float16), rng.standard_normal((k, n)).astype(np.float16)
    c = empty((m, n), np.float16)
    types = {"a": "*fp16", "b": "*fp16", "c": "*fp16", "m": "i32", "n": "i32", "k": "i32"}
    constants = {"BM": 64, "BN": 64, "BK": 64}
    compiled = compilers.triton(triton_kernels.product_by_descriptors, types, constants, 90, divisible="abcnk")
    assert "cp.async.bulk.tensor" in compiled.ptx and "wgmma" in compiled.ptx
    compiled.run((2, 3), [a, b, c, m, n, k], schedule=schedule).raise_if_faulty()
    close(c.data.astype(float), a.astype(float) @ b.astype(float), 1e-3)
    x = rng.standard_normal((16, 500)).astype(np.float16)
    out = empty(x.shape, np.float16)
    types = {"x": "*fp16", "out": "*fp16", "width": "i32"}
    compiled = compilers.triton(triton_kernels.softmax, types, {"BLOCK": 512}, 80)
    compiled.run((16,), [x, out, 500], schedule=schedule).raise_if_faulty()
    weight = np.exp(x.astype(float))
    close(out.data.astype(float), weight / weight.sum(1, keepdims=True), 1e-3)
