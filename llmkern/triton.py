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

from llmkern.backend import Backend


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


def has_descriptors(family: str) -> bool:
    """Whether an architecture ("sm_90", "gfx942") copies tiles by descriptors, in the tensor memory accelerator."""
    return family.startswith("sm_") and int(family.removeprefix("sm_")) >= 90


@dataclass(frozen=True)
class Launch:
    """One run of a kernel."""

    module: str
    kernel: str
    grid: tuple[int, ...]
    #: In the order of the kernel's own: tensors, descriptors of tensors, numbers.
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    #: Triton's: num_warps, num_stages, enable_fp_fusion.
    options: dict[str, Any]
    #: The arguments that it writes in full and does not read before, and those of which it writes some.
    written: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Descriptor:
    """An argument: a tensor of which a kernel reads blocks by the tensor memory accelerator (TMA)."""

    tensor: Tensor
    block: tuple[int, ...]

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def made(self) -> Any:
        """As Triton takes it at a launch. What it makes of it on the CPU goes by value, so that graphs hold it."""
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor(self.tensor, list(self.shape), self.strides, list(self.block))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def strides(self) -> list[int]:
        """Those of dimensions of one element as a descriptor may have them."""
        pairs = zip(self.tensor.shape, self.tensor.stride(), strict=True)
        return [stride if size > 1 else 16 for size, stride in list(pairs)[:-1]] + [1]

    @property
    def type(self) -> str:
        return f"tensordesc<{_POINTERS[self.tensor.dtype][1:]}{list(self.block)}>"


def describable(x: Tensor) -> bool:
    """Whether a tensor of these metadata may have a descriptor, where its address is `aligned`."""
    steps = [s * x.element_size() for n, s in zip(x.shape, x.stride(), strict=True) if n > 1][:-1]
    last = x.stride(-1) == 1 and x.shape[-1] > 1
    return last and 0 not in x.shape and all(0 < s < 2**40 and s % 16 == 0 for s in steps)


def aligned(*tensors: Tensor) -> bool:
    return all(x.data_ptr() % 16 == 0 for x in tensors)


Run = Callable[[Launch], None]


def function(launch: Launch) -> Any:
    """The @triton.jit function of a launch."""
    return getattr(importlib.import_module(launch.module), launch.kernel)


def run(launch: Launch) -> None:
    """Runs a kernel on the device of its first argument, on torch's current stream there."""
    with torch.cuda.device(launch.arguments[0].device):  # Triton launches on the current device
        function(launch)[launch.grid](*placed(launch), **launch.constants, **launch.options)


def placed(launch: Launch) -> list[Any]:
    """The arguments as Triton takes them."""
    return [x.made() if isinstance(x, Descriptor) else x for x in launch.arguments]


def served_by(
    function: Callable[..., Any], *between: Any, limits: Callable[..., str | None] = lambda x, *args: None
) -> Backend:
    """A backend whose launcher is `function(run, x, *between, *rest)` of a call's arguments (x, *rest), on the GPU.

    limits: why the kernel cannot take these arguments, wherever they are.
    """
    return Backend(
        "triton",
        lambda *args: lambda x, *rest: function(run, x, *between, *rest),
        lambda x, *args: unsupported(x) or limits(x, *args),
    )


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
        if isinstance(x, Tensor):
            types[name], divides = _POINTERS[x.dtype], x.data_ptr() % 16 == 0
        elif isinstance(x, Descriptor):
            types[name], divides = x.type, False
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
