"""What the Triton backends of all families share: why a call cannot be served, and a launch.

Triton is imported when a call comes, never with the package.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


@lru_cache(maxsize=1)
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: `pip install triton`"
    return None


def unsupported(x: Tensor) -> str | None:
    """Why no Triton kernel can work on x, in a sentence; None where one may."""
    if x.device.type != "cuda":
        return f"the tensors are on {x.device}, not on a GPU"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return _missing()


def unsupported_call(x: Tensor, *args: Any) -> str | None:
    """The same of a backend that takes every call."""
    return unsupported(x)


@dataclass(frozen=True)
class Described:
    """A matrix that reaches a kernel as a tensor descriptor made by the host: it is a value among the launch's
    arguments, so that nothing is allocated or written on the device, and a CUDA graph keeps it.

    tensor: where it lies, at a multiple of 16 bytes; shape; distance of its rows, 16 bytes each; box: what one load
    takes. What is behind its edges is loaded as 0.
    """

    tensor: Tensor
    shape: tuple[int, int]
    distance: int
    box: tuple[int, int]

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def descriptor(self) -> Any:
        """Triton's own."""
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor(self.tensor, [*self.shape], [self.distance, 1], [*self.box])


def has_descriptors(family: str) -> bool:
    """Whether an architecture ("sm_90", "gfx942") copies tiles by descriptors, in the tensor memory accelerator."""
    return family.startswith("sm_") and int(family.removeprefix("sm_")) >= 90


@dataclass(frozen=True)
class Launch:
    """One run of a kernel."""

    module: str
    kernel: str
    grid: tuple[int, ...]
    #: In the order of the kernel's own: tensors, Described ones, numbers.
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    #: Triton's: num_warps, num_stages, enable_fp_fusion.
    options: dict[str, Any]
    #: The arguments that it writes in full and does not read before, and those of which it writes some.
    written: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()


Run = Callable[[Launch], None]


def function(launch: Launch) -> Any:
    """The @triton.jit function of a launch."""
    return getattr(importlib.import_module(launch.module), launch.kernel)


def run(launch: Launch) -> None:
    """Runs a kernel on the device of its first argument, on torch's current stream there."""
    with torch.cuda.device(launch.arguments[0].device):  # Triton launches on the current device
        function(launch)[launch.grid](*arguments(launch), **launch.constants, **launch.options)


def arguments(launch: Launch) -> list[Any]:
    """As Triton takes them."""
    return [x.descriptor() if isinstance(x, Described) else x for x in launch.arguments]


_POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64",
    torch.uint8: "*u8", torch.int8: "*i8", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


def signature(launch: Launch) -> tuple[dict[str, str], list[str]]:
    """The types of a launch's arguments, and those known to divide by 16, as Triton finds them at a call, to compile
    ahead of time. (An integer that is 1 is no constant here, which it is there.)"""
    jit = function(launch)
    names = [n for n in jit.arg_names if n not in launch.constants]
    plain = {p.name for p in jit.params if p.do_not_specialize}
    types, divisible = {}, []
    for name, x in zip(names, launch.arguments, strict=True):
        if isinstance(x, Described):
            element = _POINTERS[x.tensor.dtype].removeprefix("*")
            types[name], divides = f"tensordesc<{element}[{x.box[0]},{x.box[1]}]>", False
        elif isinstance(x, Tensor):
            types[name], divides = _POINTERS[x.dtype], x.data_ptr() % 16 == 0
        elif isinstance(x, float):
            types[name], divides = "fp32", False
        else:
            types[name] = "i32" if -(2**31) <= x < 2**31 else "i64"
            divides = x % 16 == 0 and name not in plain
        divisible += [name] if divides else []
    return types, divisible


def family(device: torch.device) -> str:
    """The architecture of a device as the tables of configurations name it: "sm_80", ..., or "gfx942"."""
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def power_of_two(n: int) -> int:
    """The least that is at least n."""
    return 1 << max(n - 1, 0).bit_length()
