"""What the CUDA backends of all families share: why a call cannot be served, the kernels, torch's stream."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmkern import extension

OLDEST = (8, 0)  # the compute capability that the machine code in the library begins with
MOST_BLOCKS = 2**31 - 1  # of a launch
HOPPER = (9, 0)  # the one that runs the kernels for sm_90a (cuda_sm90*.cu), which no other does


def unsupported(x: Tensor) -> str | None:
    """Why no CUDA kernel of the library can work on x, in a sentence; None where one may."""
    if extension.MISSING:
        return extension.MISSING
    if not extension._C.cuda_architectures:
        return (
            "the compiled library has no CUDA part: run `pip install -e .` again with a CUDA toolkit's nvcc, 12.8 or "
            "newer, on PATH"
        )
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) was built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if x.device.type != "cuda":
        return f"the tensors are on {x.device}, not on a CUDA device"
    capability = torch.cuda.get_device_capability(x.device)
    if capability < OLDEST:
        return f"{x.device} has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0 or newer"
    if not runs_on(extension._C.cuda_architectures, capability):
        number = f"{capability[0]}{capability[1]}"
        return (
            f"{x.device} is an sm_{number} and the compiled library holds {extension._C.cuda_architectures}: build it "
            f'again with LLMKERN_CUDA_ARCHS="{number}" pip install -e .'
        )
    return None


def runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code for these, "sm_80 sm_90 + PTX 90", runs on a device: machine code on its own generation from its
    minor number on, PTX on that and whatever is newer."""
    code, _, ptx = architectures.partition(" + PTX ")
    made = [divmod(int(name.removeprefix("sm_").rstrip("af")), 10) for name in code.split()]
    newer = bool(ptx) and divmod(int(ptx.rstrip("af")), 10) <= capability
    return newer or any(major == capability[0] and minor <= capability[1] for major, minor in made)


def kernel(name: str) -> Callable[..., None]:
    """The function of the compiled library; an AttributeError where it has no CUDA part."""
    found: Callable[..., None] = getattr(extension._C, name)
    return found


def is_hopper(device: torch.device) -> bool:
    """Whether the device runs the kernels for sm_90a."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == HOPPER


def stream(device: torch.device) -> tuple[int, int]:
    """The device's index and the address of torch's current stream there, as the kernels take them."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return index, torch._C._cuda_getCurrentRawStream(index)
