"""Calls of int8_linear on CPU tensors, served by the CUDA backend, whose kernels the PTX emulator runs."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmkern import backend
from llmkern.int8 import cuda
from tests.emulation import compilers, cuda_launches
from tests.emulation.cuda_launches import Emulated, buffer_of, copy_back
from tests.emulation.ptx.launch import Buffer, Launch

BYTES = {0: 4, 1: 2, 2: 2}  # of an element, by the codes of dtypes


def reach(rows: int, columns: int, distance: int) -> int:
    """Elements from the first to the last of a matrix with rows so far apart."""
    return (rows - 1) * distance + columns if rows and columns else 0


class Int8OnEmulator(Emulated):
    """Has the functions of llmkern._C, by name. tile_rows, tile_columns: as in csrc/int8/cuda.h; hopper: whether the
    device has compute capability 9.0; digits: the last call's memory."""

    tile_rows = tile_columns = 0
    hopper = False
    digits: np.ndarray

    def int8_workspace_cuda(self, plan: Any) -> int:
        return self.module.int8_workspace_cuda(plan)

    def int8_sm90_unsupported(self, plan: Any) -> str | None:
        return self.module.int8_sm90_unsupported(plan)

    def int8_linear_cuda(
        self, plan: Any, x: int, weight: int, weight_stride: int, sums: int, scale: int, scale_stride_n: int,
        scale_stride_g: int, bias: int, residual: int, given: int, out: int, workspace: int, device: int, stream: int,
        sm90: bool,
    ) -> None:  # fmt: skip
        launch = Launch()
        rows, outputs, depth, size = plan.rows, plan.outputs, plan.depth, BYTES[plan.dtype]
        columns = outputs // 2 if plan.pairs else outputs
        groups = -(-depth // plan.group) if plan.group else 1
        scales = (outputs - 1) * scale_stride_n + (groups - 1) * scale_stride_g + 1 if outputs and groups else 0

        def place(address: int, count: int, name: str) -> int:
            return launch.address(buffer_of(address, count, name)) if address and count else 0

        padded = -(-depth // 16) * 16
        result = buffer_of(out, reach(rows, columns, plan.out_stride) * size, "out", read_only=False)
        digits = Buffer(np.zeros(self.int8_workspace_cuda(plan), np.uint8), "digits", written=False)
        addresses = (
            place(x, reach(rows, depth, plan.x_stride) * size, "x"),
            place(weight, reach(outputs, padded, weight_stride), "weight"), weight_stride,
            place(sums, outputs * 4, "weight_sums"), 
            place(scale, scales * 4, "weight_scale"), scale_stride_n, scale_stride_g,
            place(bias, outputs * BYTES[plan.bias_dtype], "bias"),
            place(residual, reach(rows, columns, plan.residual_stride) * size, "residual"),
            place(given, 8, "input_scale"), launch.address(result) if result.data.size else 0, launch.address(digits),
        )  # fmt: skip
        options = (device, stream, sm90, self.tile_rows, self.tile_columns)
        self.call(lambda: self.module.int8_linear_cuda(plan, *addresses, *options), launch)
        self.digits = digits.data
        copy_back(result, out)


@functools.cache
def _built() -> tuple[Any, list[str]]:
    with tempfile.TemporaryDirectory() as folder:
        return cuda_launches.build(Path(folder), "int8")


def serve(monkeypatch: pytest.MonkeyPatch) -> Int8OnEmulator:
    """From here on, calls on CPU tensors are served by the CUDA backend."""
    if compilers.NVCC is None:
        pytest.skip(compilers.NO_NVCC)
    emulator = Int8OnEmulator(*_built())
    monkeypatch.setattr("llmkern.cuda.kernel", lambda name: getattr(emulator, name))
    monkeypatch.setattr("llmkern.cuda.is_hopper", lambda device: emulator.hopper)
    monkeypatch.setattr("llmkern.cuda.stream", lambda device: (0, 0))
    operator = backend.Operator.all["int8_linear"]
    served = backend.Backend("cuda", cuda.CUDA_INT8_LINEAR.plan, cuda._refused)
    monkeypatch.setattr(operator, "by_device", {**operator.by_device, "cpu": [served]})
    backend.forget_plans()
    return emulator
