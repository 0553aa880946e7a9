"""Plans by which several processes share the layers of a model, each with some heads and some of the inner width.

Every module's first product is split by its outputs and its last by its inputs, so that one sum over the processes is
enough for each (Shoeybi et al. 2019, "Megatron-LM", section 3). Between them the kernels run on plain tensors, each
process's heads being a batch of their own; embeddings, norms and the output's matrix are whole everywhere.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from llmkern.attention.reference import MultiHeadAttention
from llmkern.training.layers import Attention, FeedForward


def tensor_parallel_plan(model: nn.Module) -> dict[str, ParallelStyle]:
    """For torch's parallelize_module: how the linear layers of each module of ours in the model are split.

    Serves the attention and the feed-forward of build_model's models and llmkern.MultiHeadAttention, whose n_head
    `parallelize` sets to those of one process.
    """
    plan: dict[str, ParallelStyle] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, (Attention, MultiHeadAttention)):
            plan |= {f"{prefix}{name}": ColwiseParallel() for name in ("w_q", "w_k", "w_v")}
            plan[f"{prefix}w_o"] = RowwiseParallel()
        elif isinstance(module, FeedForward):
            first = ("w_up",) if module.w_gate is None else ("w_gate", "w_up")
            plan |= {f"{prefix}{name}": ColwiseParallel() for name in first}
            plan[f"{prefix}w_down"] = RowwiseParallel()
    return plan


def parallelize(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Splits the model's layers over a mesh of one dimension, in place, and returns it.

    Raises ValueError where the processes do not divide a module's heads or inner width, or where nothing in the model
    can be split.
    """
    plan = tensor_parallel_plan(model)
    if not plan:
        raise ValueError("model: expected attention or feed-forward of llmkern, got a model with neither")
    size = mesh.size()
    for path, module in model.named_modules():
        if isinstance(module, Attention):
            parts = module.w_q.out_features // module.head
        elif isinstance(module, MultiHeadAttention):
            parts = module.n_head
        elif isinstance(module, FeedForward):
            parts = module.w_up.out_features
        else:
            continue
        if parts % size:
            raise ValueError(f"mesh: expected a divisor of {path}'s {parts} heads or inner width, got {size} processes")
        if isinstance(module, MultiHeadAttention):
            module.n_head = parts // size
    return parallelize_module(model, mesh, plan)
