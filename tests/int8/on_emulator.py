"""Calls of int8_linear on CPU tensors, served by the CUDA backend, whose kernels the PTX emulator runs."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.emulation.cuda_launches import Emulated, buffer_of, copy_back
from tests.emulation.ptx.launch import Buffer, Launch

BYTES = {0: 4, 1: 2, 2: 2}  # of an element, by the codes of dtypes


def reach(rows: int, columns: int, distance: int) -> int:
    """Elements from the first to the last of a matrix with rows so far apart."""
    return (rows - 1) * distance + columns if rows and columns else 0


class Int8OnEmulator(Emulated):
    """Has the functions of llmkern._C, by name."""

    def int8_workspace_cuda(self, plan: Any) -> int:
        return self.module.int8_workspace_cuda(plan)

    def int8_linear_cuda(
        self, plan: Any, x: int, weight: int, weight_stride: int, sums: int, scale: int, bias: int, residual: int,
        given: int, out: int, workspace: int, device: int, stream: int,
    ) -> None:  # fmt: skip
        launch = Launch()
        rows, outputs, depth, size = plan.rows, plan.outputs, plan.depth, BYTES[plan.dtype]
        columns = outputs // 2 if plan.pairs else outputs
        groups = -(-depth // plan.group) if plan.group else 1

        def place(address: int, count: int, name: str) -> int:
            return launch.address(buffer_of(address, count, name)) if address and count else 0

        padded = -(-depth // 16) * 16
        result = buffer_of(out, reach(rows, columns, plan.out_stride) * size, "out", read_only=False)
        digits = Buffer(np.zeros(self.int8_workspace_cuda(plan), np.uint8), "digits", written=False)
        addresses = (
            place(x, reach(rows, depth, plan.x_stride) * size, "x"),
            place(weight, reach(outputs, padded, weight_stride), "weight"), weight_stride,
            place(sums, outputs * 4, "weight_sums"), place(scale, outputs * groups * 4, "weight_scale"),
            place(bias, outputs * BYTES[plan.bias_dtype], "bias"),
            place(residual, reach(rows, columns, plan.residual_stride) * size, "residual"),
            place(given, 8, "input_scale"), launch.address(result) if result.data.size else 0, launch.address(digits),
        )  # fmt: skip
        self.digits = digits
        self.call(lambda: self.module.int8_linear_cuda(plan, *addresses, device, stream), launch)
        copy_back(result, out)
