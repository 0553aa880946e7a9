"""Triton's attention kernels without a GPU: what the launcher would launch, compiled by Triton and executed as PTX."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any

import torch

from llmkern.attention import triton_launch
from tests.emulation import compilers
from tests.emulation.ptx.launch import Buffer, Launch, Report, empty, run


@lru_cache(maxsize=64)
def _compiled(
    name: str, types: tuple[Any, ...], constants: tuple[Any, ...], divisible: tuple[str, ...], options: tuple[Any, ...],
    capability: int,
) -> compilers.TritonKernel:  # fmt: skip
    left = dict(options)
    return compilers.triton(
        triton_launch.kernel(name), dict(types), dict(constants), capability, left.pop("num_warps"),
        left.pop("num_stages"), divisible, **left,
    )  # fmt: skip


def compiled(launch: triton_launch.Launch, capability: int) -> compilers.TritonKernel:
    types, divisible = triton_launch.signature(launch)
    return _compiled(
        launch.kernel, tuple(types.items()), tuple(launch.constants.items()), tuple(divisible),
        tuple(launch.options.items()), capability,
    )  # fmt: skip


class Emulated:
    """Stands for triton_launch.run: compiles for a capability and runs the PTX on CPU tensors, in place."""

    def __init__(self, capability: int = 80, schedule: str = "lockstep", counts: bool = False) -> None:
        self.capability, self.schedule, self.counts = capability, schedule, counts
        self.reports: list[Report] = []
        self.ptx: list[str] = []
        self.launched: list[tuple[int, str]] = []
        self.changed: dict[str, Any] = {}  # constants instead of the launcher's
        self.more: dict[str, int] = {}  # what is added to arguments

    def __call__(self, launch: triton_launch.Launch) -> None:
        launch = dataclasses.replace(launch, constants={**launch.constants, **self.changed})
        kernel, memory, arguments = compiled(launch, self.capability), Launch(), []
        given = zip(triton_launch.kernel(launch.kernel).arg_names, launch.arguments, strict=False)
        for name, x in given:
            if isinstance(x, torch.Tensor):
                x = self._place(memory, launch, name, x)
            arguments.append(x + self.more[name] if name in self.more else x)
        scratch = empty((max(kernel.scratch * launch.programs, 1),), "uint8", "scratch")
        report = run(
            kernel.ptx, None, (launch.programs,), kernel.threads, [*arguments, scratch, 0], shared_bytes=kernel.shared,
            launch=memory, schedule=self.schedule, counts=self.counts,
        )  # fmt: skip
        self.launched.append((launch.programs, launch.kernel))
        self.reports.append(report.raise_if_faulty())
        self.ptx.append(kernel.ptx)

    def _place(self, memory: Launch, launch: triton_launch.Launch, name: str, x: torch.Tensor) -> int:
        """The address of a tensor, whose storage is in the emulator's memory as it lies."""
        if not x.numel():
            return 0
        storage, fresh = x.untyped_storage(), name in launch.written
        data = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        fixed = not fresh and name not in launch.changed
        buffer = Buffer(data, name, written=not fresh, read_only=fixed, offset=storage.data_ptr() % 16)
        return memory.address(buffer) + x.storage_offset() * x.element_size()
