"""A call of an operator beside its plain version."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.steps import Setting

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
FLOATS = {"fp32": torch.float32, **HALVES}


@dataclass(frozen=True)
class Call:
    """function and plain take `args` and give the same; plain also in float64. gradients: also of the inputs."""

    function: Callable[..., Any]
    plain: Callable[..., Any]
    args: tuple[Any, ...]
    gradients: bool = False


@dataclass(frozen=True)
class Case:
    """make: builds the tensors, when the case's turn has come."""

    operator: str
    name: str
    make: Callable[[], Call]


def random(setting: Setting, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator(setting.device).manual_seed(setting.seed + sum(shape))
    return torch.randn(shape, generator=generator, device=setting.device).to(dtype)
