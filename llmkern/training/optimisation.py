"""AdamW with decay groups, the schedule of the learning rate, and clipping, for whole and for sharded parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.lr_scheduler import LambdaLR

from llmkern.training.configuration import PretrainingConfig


def mesh_of(tensor: Tensor) -> DeviceMesh | None:
    """Over which processes it lies; torch's functions over many tensors take those of one mesh at a time."""
    return tensor.device_mesh if isinstance(tensor, DTensor) else None


def by_mesh(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """The tensors, in order, apart by what they lie on."""
    found: dict[DeviceMesh | None, list[Tensor]] = {}
    for t in tensors:
        found.setdefault(mesh_of(t), []).append(t)
    return list(found.values())


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay, embeddings too; vectors (biases, the weights of norms) do not.

    As BERT's and GPT-2's published training code has it: there embeddings are among what decays.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, object]] = []
    for decays in (True, False):
        for part in by_mesh(p for p in parameters if (p.dim() >= 2) == decays):
            groups.append({"params": part, "weight_decay": weight_decay if decays else 0.0})
    return groups


def make_optimizer(model: nn.Module, config: PretrainingConfig) -> torch.optim.Optimizer:
    """Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization"."""
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay), lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon, fused=True,
    )  # fmt: skip


def factor(step: int, kind: str, warmup: int, total: int | None) -> float:
    """What the learning rate is multiplied by at a step, counted from 0."""
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant" or total is None:
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.5 * (1.0 + math.cos(math.pi * done)) if kind == "cosine" else 1.0 - done


def make_scheduler(optimizer: torch.optim.Optimizer, config: PretrainingConfig, total: int | None) -> LambdaLR:
    """The learning rate by steps; total: how many there will be."""
    return LambdaLR(optimizer, lambda step: factor(step, config.lr_scheduler, config.warmup_steps, total))


def total_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The 2-norm () of all gradients together, the same on every process."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = []
    for part in by_mesh(gradients):
        norm = get_total_norm(part)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def clip(parameters: Iterable[nn.Parameter], most: float, norm: Tensor) -> None:
    """Scales the gradients, whose norm is given, to one of at most `most`."""
    parameters = [p for p in parameters if p.grad is not None]
    for part in by_mesh(parameters):
        clip_grads_with_norm_(part, most, norm)
