"""How evaluations run a model: without gradients, in eval mode, on its device, each process with its share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")
PRECISIONS = ("float32", "bfloat16", "float16")


def device_of(model: nn.Module) -> torch.device:
    """That of its first parameter or buffer."""
    found = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if found is None else found.device


def whole(model: nn.Module) -> nn.Module:
    """The model without DDP, whose forward waits for the other processes, which may have fewer batches.

    Raises ValueError for one whose parameters are shared among processes (FSDP, tensor parallelism): a pass of theirs
    needs all of them at once, and here each may have another number of batches.
    """
    found = model.module if isinstance(model, DistributedDataParallel) else model
    for name, parameter in found.named_parameters():
        if hasattr(parameter, "device_mesh"):
            raise ValueError(f"model: expected one that is whole on every process, got a sharded one ({name})")
    return found


def cast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast, or nothing for "float32"."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, precision))


@contextlib.contextmanager
def evaluating(model: nn.Module, precision: str = "float32") -> Iterator[None]:
    """In eval mode and without gradients, under autocast unless precision is "float32"; afterwards as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), cast(device_of(model), precision):
            yield
    finally:
        for module in training:
            module.training = True


def processes() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(batches: Iterable[T], what: str, progress: bool) -> Iterator[T]:
    """This process's batches, every n-th of n processes, with a bar on the first one's terminal."""
    from tqdm import tqdm

    rank, size = processes()
    shown = None if progress and rank == 0 else True  # None: where stderr is a terminal
    for number, batch in enumerate(tqdm(batches, desc=what, unit="batch", disable=shown, leave=False)):
        if number % size == rank:
            yield batch


def total(values: list[float], device: torch.device) -> list[float]:
    """Sums over all processes, in float64."""
    if processes()[1] == 1:
        return values
    # NCCL takes tensors of its own device alone, and gloo those of the CPU.
    place = device if dist.get_backend() == "nccl" else torch.device("cpu")
    summed = torch.tensor(values, dtype=torch.float64, device=place)
    dist.all_reduce(summed)
    return list(map(float, summed))


def gathered(found: list[T]) -> list[T]:
    """What all processes found."""
    size = processes()[1]
    if size == 1:
        return found
    parts: list[Any] = [None] * size
    dist.all_gather_object(parts, found)
    return list(chain.from_iterable(parts))


def tensors(batch: Any, device: torch.device) -> dict[str, Any]:
    """The batch's keyword inputs, tensors on the device.

    Raises TypeError for a batch that is no mapping.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"dataset: expected batches that map names of the model's arguments to tensors, got {type(batch).__name__}"
        )
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def logits_of(output: Any) -> Tensor:
    """Those in a model's output: the output, its `logits`, or the first of a tuple.

    Raises TypeError where there are none.
    """
    found = getattr(output, "logits", output)
    found = found[0] if isinstance(found, tuple) and found else found
    if not isinstance(found, Tensor):
        raise TypeError(f"model: expected one whose output has logits, got {type(output).__name__}")
    return found
