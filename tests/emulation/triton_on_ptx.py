"""Launches of Triton kernels without a GPU: compiled by Triton for a capability and executed as PTX, on CPU tensors."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from llmkern import triton
from tests.emulation import compilers
from tests.emulation.attention_forward import place
from tests.emulation.ptx.launch import Launch, Report, empty, run


@lru_cache(maxsize=64)
def _compiled(
    module: str, name: str, types: tuple[Any, ...], constants: tuple[Any, ...], divisible: tuple[str, ...],
    options: tuple[Any, ...], capability: int,
) -> compilers.TritonKernel:  # fmt: skip
    kernel = triton.function(triton.Launch(module, name, (), (), {}, {}))
    left = dict(options)
    return compilers.triton(
        kernel, dict(types), dict(constants), capability, left.pop("num_warps"), left.pop("num_stages"), divisible,
        **left,
    )  # fmt: skip


def compiled(launch: triton.Launch, capability: int) -> compilers.TritonKernel:
    types, divisible = triton.signature(launch)
    return _compiled(
        launch.module, launch.kernel, tuple(types.items()), tuple(launch.constants.items()), tuple(divisible),
        tuple(launch.options.items()), capability,
    )  # fmt: skip


class Emulated:
    """Stands for llmkern.triton.run."""

    def __init__(self, capability: int = 80, schedule: str = "lockstep", counts: bool = False) -> None:
        self.capability, self.schedule, self.counts = capability, schedule, counts
        self.reports: dict[str, Report] = {}
        self.ptx: dict[str, str] = {}

    def __call__(self, launch: triton.Launch) -> None:
        kernel, memory, arguments = compiled(launch, self.capability), Launch(), []
        for name, x in zip(triton.function(launch).arg_names, launch.arguments, strict=False):
            if isinstance(x, torch.Tensor):
                x = place(memory, x, name, name not in launch.written)[0] if x.numel() else 0
            arguments.append(x)
        programs = 1
        for n in launch.grid:
            programs *= n
        scratch = empty((max(kernel.scratch * programs, 1),), "uint8", "scratch")
        report = run(
            kernel.ptx, None, launch.grid, kernel.threads, [*arguments, scratch, 0], shared_bytes=kernel.shared,
            launch=memory, schedule=self.schedule, counts=self.counts,
        )  # fmt: skip
        self.reports[launch.kernel] = report.raise_if_faulty()
        self.ptx[launch.kernel] = kernel.ptx
