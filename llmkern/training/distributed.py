"""The processes of a run: DDP, FSDP2 and tensor parallelism around a model, as torchrun starts them.

Without torchrun there is one process, and nothing here does anything: the same script serves both.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler

from llmkern.training.configuration import PretrainingConfig
from llmkern.training.joining import join
from llmkern.training.step import MixedPrecisionTrainer
from llmkern.training.tensor_parallel import parallelize


@dataclass(frozen=True)
class Processes:
    """Where this process stands: its rank among all, among those that see other data, and its device.

    mesh: (data, tensor), None where there is one process.
    """

    rank: int
    size: int
    data_rank: int
    data_size: int
    device: torch.device
    mesh: DeviceMesh | None

    @classmethod
    def join(cls, config: PretrainingConfig) -> Processes:
        """Joins the group that torchrun's environment describes, if it is not joined yet."""
        local = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
        if not dist.is_initialized() and "RANK" in os.environ:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            join("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        shared = config.tensor_parallel_size
        size = dist.get_world_size() if dist.is_initialized() else 1
        if size % shared:
            raise ValueError(f"tensor_parallel_size: expected a divisor of the {size} processes, got {shared}")
        if size == 1:
            return cls(0, 1, 0, 1, device, None)
        mesh = init_device_mesh(device.type, (size // shared, shared), mesh_dim_names=("data", "tensor"))
        return cls(dist.get_rank(), size, mesh["data"].get_local_rank(), size // shared, device, mesh)

    def wrap(self, model: nn.Module, config: PretrainingConfig) -> nn.Module:
        """The model on its device, shared and replicated or sharded as the configuration has it."""
        model = model.to(self.device)
        if self.mesh is None:
            return model
        if config.parallelism == "fsdp" or config.tensor_parallel_size > 1:
            _agree(model)
        if config.tensor_parallel_size > 1:
            parallelize(model, self.mesh["tensor"])
        if self.data_size == 1:
            return model
        if config.parallelism == "fsdp" or config.tensor_parallel_size > 1:
            return self._shard(model, config)
        # Buckets that DDP arranges anew after the first step would sum in another order after a restart than without
        # one. It leaves them where parameters may be unused, as the head of an objective is that a batch lacks.
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids, find_unused_parameters=True)

    def _shard(self, model: nn.Module, config: PretrainingConfig) -> nn.Module:
        assert self.mesh is not None
        options: dict[str, Any] = {"mesh": self.mesh["data"], "mp_policy": MixedPrecisionPolicy()}
        for block in getattr(model, "layers", []):
            fully_shard(block, **options)
        fully_shard(model, **options)  # changes its class, in place
        return model


def _agree(model: nn.Module) -> None:
    """Every process begins with the parameters of the first, as DDP sees to by itself."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor, 0)


class DistributedTrainer(MixedPrecisionTrainer):
    """train_step(batch) -> float on every process of torchrun, each with its own batch; without torchrun on one.

    model: is put on this process's device and wrapped in DDP, or sharded by FSDP2 where config.parallelism is "fsdp";
    with config.tensor_parallel_size processes share its layers. config: PretrainingConfig's defaults without one.
    optimizer: one made of the model's parameters, for DDP alone; by default the AdamW of the config. precision: by
    default the config's.

    The loss is the mean over what counts in the batches of all processes. Raises ValueError for an optimizer where
    parameters are sharded, which it would not see.
    """

    def __init__(
        self,
        model: nn.Module,
        config: PretrainingConfig | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: LRScheduler | None = None,
        *,
        precision: str | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        given, config = config, PretrainingConfig() if config is None else config
        if config.tensor_parallel_size > 1 and (precision or config.precision) == "float16":
            raise ValueError("precision: expected float32 or bfloat16 with tensor_parallel_size above 1, got float16")
        self.processes = Processes.join(config)
        wrapped = self.processes.wrap(model, config)
        if optimizer is not None and self.is_sharded(wrapped):
            raise ValueError("optimizer: expected None where parameters are sharded, got one of those before")
        super().__init__(wrapped, optimizer, scheduler, config=given, precision=precision or config.precision)

    @staticmethod
    def is_sharded(model: nn.Module) -> bool:
        """Whether no process has all parameters."""
        return any(hasattr(p, "device_mesh") for p in model.parameters())

    @property
    def inner(self) -> nn.Module:
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    @property
    def _rank(self) -> int:
        return self.processes.rank

    def _mean(self, value: Tensor) -> Tensor:
        if self.processes.mesh is None or self.processes.data_size == 1:
            return value
        value = value.clone()
        dist.all_reduce(value, group=self.processes.mesh["data"].get_group())
        return value / self.processes.data_size

    @contextlib.contextmanager
    def _reducing(self, last: bool) -> Iterator[None]:
        if isinstance(self.model, DistributedDataParallel) and not last:
            with self.model.no_sync():
                yield
            return
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
        yield
