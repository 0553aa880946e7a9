"""Triton's attention kernels without a GPU: what the launcher would launch, compiled by Triton and executed as PTX."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any

import torch

from llmkern.attention import triton_launch
from tests.emulation import compilers
from tests.emulation.attention_forward import place
from tests.emulation.ptx.launch import Launch, Report, empty, run

_POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64",
    torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


def kernel_of(name: str) -> Any:
    return triton_launch.kernel(name)


def described(launch: triton_launch.Launch) -> tuple[dict[str, str], list[str]]:
    """The types of a launch's arguments, and those that are known to divide by 16, as Triton's own launcher finds them.

    An integer that is 1 is no constant here, which it would be there.
    """
    kernel = kernel_of(launch.kernel)
    names = [n for n in kernel.arg_names if n not in launch.constants]
    fixed = {p.name for p in kernel.params if p.do_not_specialize}
    types, divisible = {}, []
    for name, x in zip(names, launch.arguments, strict=True):
        if isinstance(x, torch.Tensor):
            types[name] = _POINTERS[x.dtype]
            divides = x.data_ptr() % 16 == 0
        elif isinstance(x, float):
            types[name], divides = "fp32", False
        else:
            types[name] = "i32" if -(2**31) <= x < 2**31 else "i64"
            divides = x % 16 == 0 and name not in fixed
        divisible += [name] if divides else []
    return types, divisible


@lru_cache(maxsize=64)
def _compiled(
    name: str, types: tuple[Any, ...], constants: tuple[Any, ...], divisible: tuple[str, ...], options: tuple[Any, ...],
    capability: int,
) -> compilers.TritonKernel:  # fmt: skip
    left = dict(options)
    return compilers.triton(
        kernel_of(name), dict(types), dict(constants), capability, left.pop("num_warps"), left.pop("num_stages"),
        divisible, **left,
    )  # fmt: skip


def compiled(launch: triton_launch.Launch, capability: int) -> compilers.TritonKernel:
    types, divisible = described(launch)
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
        self.changed: dict[str, Any] = {}  # constants instead of the launcher's

    def __call__(self, launch: triton_launch.Launch) -> None:
        launch = dataclasses.replace(launch, constants={**launch.constants, **self.changed})
        kernel, memory, arguments = compiled(launch, self.capability), Launch(), []
        given = zip([n for n in kernel_of(launch.kernel).arg_names], launch.arguments, strict=False)
        for name, x in given:
            if isinstance(x, torch.Tensor):
                x = place(memory, x, name, name not in launch.written)[0] if x.numel() else 0
            arguments.append(x)
        scratch = empty((max(kernel.scratch * launch.programs, 1),), "uint8", "scratch")
        report = run(
            kernel.ptx, None, (launch.programs,), kernel.threads, [*arguments, scratch, 0], shared_bytes=kernel.shared,
            launch=memory, schedule=self.schedule, counts=self.counts,
        )  # fmt: skip
        self.reports.append(report.raise_if_faulty())
        self.ptx.append(kernel.ptx)
