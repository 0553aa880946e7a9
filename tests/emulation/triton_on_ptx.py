"""Launches of Triton kernels without a GPU: compiled by Triton for a capability and executed as PTX, on CPU tensors."""

from __future__ import annotations

import dataclasses
import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from llmkern import triton
from tests.emulation import compilers
from tests.emulation.ptx.launch import Buffer, Launch, Report, empty, run
from tests.emulation.ptx.tensor_copy import TensorMap


@lru_cache(maxsize=64)
def _compiled(
    module: str, name: str, types: tuple[Any, ...], constants: tuple[Any, ...], divisible: tuple[str, ...],
    options: tuple[Any, ...], capability: int,
) -> compilers.TritonKernel:  # fmt: skip
    kernel = triton.function(triton.Launch(module, name, (), (), {}, {}))
    left = dict(options)
    return compilers.triton(
        kernel, dict(types), dict(constants), capability, left.pop("num_warps"), left.pop("num_stages", 3), divisible,
        **left,
    )  # fmt: skip


def compiled(launch: triton.Launch, capability: int) -> compilers.TritonKernel:
    types, divisible = triton.signature(launch)
    return _compiled(
        launch.module, launch.kernel, tuple(types.items()), tuple(launch.constants.items()), tuple(divisible),
        tuple(launch.options.items()), capability,
    )  # fmt: skip


def _tensor_map(x: triton.Descriptor, told: dict[str, Any], address: int) -> list[Any]:
    """What Triton's launcher makes of a descriptor: the tensor map, the shape and the strides."""
    shape, size = x.shape, x.tensor.element_size()
    assert told["elem_size"] == size and not told["fp4_padded"], told
    view = np.lib.stride_tricks.as_strided(np.empty(1, f"u{size}"), shape, [s * size for s in x.strides])
    swizzle = (0, 32, 64, 128)[told["swizzle"]]
    return [TensorMap(view, tuple(told["block_size"]), swizzle, address), *shape, *x.strides]


class Emulated:
    """Stands for llmkern.triton.run: compiles for a capability and runs the PTX on CPU tensors, in place."""

    def __init__(self, capability: int = 80, schedule: str = "lockstep", counts: bool = False) -> None:
        self.capability, self.schedule, self.counts = capability, schedule, counts
        self.reports: list[Report] = []
        self.ptx: list[str] = []
        self.launched: list[tuple[int, str]] = []  # programs and kernel
        self.changed: dict[str, Any] = {}  # constants instead of the launcher's
        self.more: dict[str, int] = {}  # what is added to arguments

    def report_of(self, kernel: str) -> Report:
        """The last one of this kernel."""
        return next(r for r, (_, name) in zip(self.reports[::-1], self.launched[::-1], strict=True) if name == kernel)

    def __call__(self, launch: triton.Launch) -> None:
        launch = dataclasses.replace(launch, constants={**launch.constants, **self.changed})
        kernel, memory, arguments = compiled(launch, self.capability), Launch(), []
        described = iter(kernel.descriptors)
        for name, x in zip(triton.function(launch).arg_names, launch.arguments, strict=False):
            if isinstance(x, triton.Descriptor):
                address = self._place(memory, launch, name, x.tensor)
                arguments += _tensor_map(x, next(described), address)
                continue
            if isinstance(x, torch.Tensor):
                x = self._place(memory, launch, name, x)
            arguments.append(x + self.more[name] if name in self.more else x)
        programs = math.prod(launch.grid)
        scratch = empty((max(kernel.scratch * programs, 1),), "uint8", "scratch")
        report = run(
            kernel.ptx, None, launch.grid, kernel.threads, [*arguments, scratch, 0], shared_bytes=kernel.shared,
            launch=memory, schedule=self.schedule, counts=self.counts, init_fences=False,  # Triton writes none
        )  # fmt: skip
        self.launched.append((programs, launch.kernel))
        self.reports.append(report.raise_if_faulty())
        self.ptx.append(kernel.ptx)

    def _place(self, memory: Launch, launch: triton.Launch, name: str, x: torch.Tensor) -> int:
        """The address of a tensor, whose storage is in the emulator's memory as it lies."""
        if not x.numel():
            return 0
        storage, fresh = x.untyped_storage(), name in launch.written
        data = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        fixed = not fresh and name not in launch.changed
        buffer = Buffer(data, name, written=not fresh, read_only=fixed, offset=storage.data_ptr() % 16)
        return memory.address(buffer) + x.storage_offset() * x.element_size()
