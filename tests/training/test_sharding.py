"""The operators' DTensor rules and the tensor parallel plans, on two gloo processes, against one tensor in one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.multiprocessing import spawn

import llmkern
from llmkern import functional as f
from llmkern.training import build_model
from llmkern.training.sharding import register
from llmkern.training.tensor_parallel import parallelize, tensor_parallel_plan
from tests.training import tiny

WORLD = 2
BOUNDS = torch.tensor([0, 3, 8], dtype=torch.int32)
COS, SIN, MASK = torch.rand(200, generator=torch.Generator().manual_seed(2)).split([64, 64, 72])
COS, SIN, MASK = COS.view(16, 4), SIN.view(16, 4), MASK.view(2, 1, 6, 6) > 0.3
POSITIONS = torch.tensor([[0, 1, 2, 3], [5, 6, 7, 9]])


def attention(q, k, v, **options):
    return f.scaled_dot_product_attention(q, k, v, **options)


def varlen(q, k, v, bounds):
    return f.attention_varlen(q, k, v, bounds, bounds, max_seqlen_q=5, max_seqlen_k=5, is_causal=True)


def int8(x, weight, scale, bias, activation="none"):
    return f.int8_linear(x, weight, scale, bias, activation=activation)


def linear_loss(reduction):
    return lambda h, w, b, t: f.linear_cross_entropy(h, w, t, b, label_smoothing=0.1, z_loss=0.01, reduction=reduction)


TARGETS = torch.tensor([3, 0, 5, 2, -100, -100, -100, 1])  # of the second half one counts
BASE = torch.linspace(-1, 1, 45).view(9, 5)
HEAD, SPLIT = [(8, 6), (9, 6), (9,), TARGETS], [Shard(0), None, None, Shard(0)]
QKV = [(2, 4, 6, 8)] * 3
INT8 = [torch.linspace(-2, 2, 4 * 32).view(4, 32), (torch.arange(8 * 32) * 37 % 255 - 127).to(torch.int8).view(8, 32),
        torch.linspace(0.01, 0.02, 8), torch.linspace(-1, 1, 8)]  # fmt: skip
#: By name: the function, the shapes of what has gradients (or tensors without), how each is placed, and how the result
#: is to lie: nothing is gathered on the way.
CASES = {
    "layer_norm": (f.layer_norm, [(4, 6, 8), (8,), (8,)], [Shard(0), None, None], Shard(0)),
    "layer_norm of sequences": (f.layer_norm, [(4, 6, 8), (8,), (8,)], [Shard(1), None, None], Shard(1)),
    "rms_norm": (f.rms_norm, [(4, 8), (8,)], [Shard(0), None], Shard(0)),
    "rms_norm with a residual": (
        lambda x, w, r: sum(f.rms_norm(x, w, residual=r)),
        [(4, 8), (8,), (4, 8)],
        [Shard(0), None, Shard(0)],
        Shard(0),
    ),
    "norm over a split row is whole": (f.rms_norm, [(4, 8), (8,)], [Shard(1), None], None),
    "swiglu": (f.swiglu, [(4, 6)] * 2, [Shard(1), Shard(1)], Shard(1)),
    "geglu": (f.geglu, [(4, 6)] * 2, [Shard(0), Shard(0)], Shard(0)),
    "rotary of heads": (
        lambda q, k, c, s: torch.cat(f.rotary(q, k, c, s), 2), [(2, 2, 4, 8), (2, 2, 4, 8), COS, SIN],
        [Shard(1), Shard(1), None, None], Shard(1),
    ),
    "rotary of sequences": (
        lambda q, c, s, p: f.rotary(q, None, c, s, position_ids=p)[0], [(2, 2, 4, 8), COS, SIN, POSITIONS],
        [Shard(2), None, None, Shard(1)], Shard(2),
    ),
    "attention of heads": (attention, QKV, [Shard(1)] * 3, Shard(1)),
    "attention of a batch": (lambda q, k, v: attention(q, k, v, is_causal=True), QKV, [Shard(0)] * 3, Shard(0)),
    "attention, heads in groups": (
        lambda q, k, v: attention(q, k, v, enable_gqa=True), [(2, 4, 6, 8), (2, 2, 6, 8), (2, 2, 6, 8)],
        [Shard(1)] * 3, Shard(1),
    ),
    "attention, heads that do not divide": (
        lambda q, k, v: attention(q, k, v, enable_gqa=True), [(2, 4, 6, 8), (2, 1, 6, 8), (2, 1, 6, 8)],
        [Shard(1), None, None], None,
    ),
    "attention under a mask": (
        lambda q, k, v, m: attention(q, k, v, attn_mask=m), [*QKV, MASK],
        [Shard(0)] * 4, Shard(0),
    ),
    "attention under a mask of heads and a sink": (
        lambda q, k, v, m, s: attention(q, k, v, attn_mask=m, learnable_sink=s), [*QKV, (1, 4, 6, 6), (4,)],
        [Shard(1), Shard(1), Shard(1), Shard(1), Shard(0)], Shard(1),
    ),
    "attention with a sink, of a batch": (
        lambda q, k, v, s: attention(q, k, v, learnable_sink=s), [*QKV, (4,)], [Shard(0)] * 3 + [None], Shard(0),
    ),
    "int8 linear of rows": (int8, INT8, [Shard(0), None, None, None], Shard(0)),
    "int8 linear of outputs": (
        lambda *args: int8(*args, activation="gelu"), INT8, [None, Shard(0), Shard(0), Shard(0)], Shard(1)
    ),
    "int8 linear, outputs in pairs": (
        lambda *args: int8(*args, activation="swiglu"), INT8, [None, Shard(0), Shard(0), Shard(0)], None
    ),
    "cross_entropy of rows": (
        lambda x, t: f.cross_entropy(x, t, reduction="none"), [(8, 9), TARGETS], [Shard(0)] * 2, Shard(0)
    ),
    "the mean of cross_entropy": (f.cross_entropy, [(8, 9), TARGETS], [Shard(0)] * 2, Partial()),
    "CrossEntropyLoss": (lambda x, t: llmkern.CrossEntropyLoss()(x, t), [(8, 9), TARGETS], [Shard(0)] * 2, Partial()),
    "distillation": (f.distillation, [(8, 9), (8, 9), TARGETS], [Shard(0)] * 3, Partial()),
    "linear_cross_entropy of rows": (linear_loss("none"), HEAD, SPLIT, Shard(0)),
    "the sum of linear_cross_entropy": (linear_loss("sum"), HEAD, SPLIT, Partial()),
    "the mean of linear_cross_entropy": (linear_loss("mean"), HEAD, SPLIT, Partial()),
    "the mean of no rows": (linear_loss("mean"), [*HEAD[:3], TARGETS * 0 - 100], SPLIT, Partial()),
    "linear_distillation is whole": (
        f.linear_distillation, [(8, 6), (9, 6), BASE[:8], BASE, TARGETS],
        [Shard(0), None, Shard(0), None, Shard(0)], None,
    ),
    "attention of sequences end to end": (varlen, [(8, 4, 8)] * 3 + [BOUNDS], [Shard(1)] * 3 + [None], Shard(1)),
}  # fmt: skip


def tensors_of(shapes):
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(s, generator=generator).requires_grad_() if isinstance(s, tuple) else s for s in shapes
    ]  # fmt: skip


def results(function, tensors):
    """The output, and the gradients of what has one."""
    output = function(*tensors)
    if not output.requires_grad:
        return [output]
    output.backward(torch.linspace(-1, 1, output.numel()).view(output.shape) if not isinstance(output, DTensor)
                    else distribute_tensor(torch.linspace(-1, 1, output.numel()).view(output.shape),
                                           output.device_mesh, [Replicate()]))  # fmt: skip
    return [output, *(t.grad for t in tensors if t.requires_grad)]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    register()
    found, placed = {}, {}
    for name, (function, shapes, placements, _) in CASES.items():
        whole = tensors_of(shapes)
        parts = [
            distribute_tensor(t.detach(), mesh, [p or Replicate()]).requires_grad_(t.requires_grad)
            for t, p in zip(whole, placements, strict=True)
        ]
        got = results(function, parts)
        placed[name] = str(got[0].placements[0])
        found[name] = [t.full_tensor().detach().clone() for t in got]
    model = parallelize(build_model(tiny.config(objective="seq2seq")), mesh)
    placed["w_q"] = [list(model.layers[3].cross.w_q.weight.to_local().shape), str(model.layers[0].norm1.weight.device)]
    attention = llmkern.MultiHeadAttention(16, 4)
    with torch.no_grad():
        for i, p in enumerate(attention.parameters()):
            p.copy_(torch.linspace(-1, 1, p.numel()).view(p.shape) * (i + 1) / 8)
    parallelize(attention, mesh)
    x = torch.linspace(-1, 1, 2 * 5 * 16).view(2, 5, 16)
    found["MultiHeadAttention"] = [attention(x, x, x, need_weights=False)[0].detach() + 0.0]
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
        Path(f"{folder}/placed.json").write_text(json.dumps(placed))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharding")
    spawn(work, (str(folder),), nprocs=WORLD)
    return torch.load(folder / "found.pt"), json.loads((folder / "placed.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_parts_give_what_the_whole_gives(name, found):
    function, shapes, _, placement = CASES[name]
    expected = results(function, tensors_of(shapes))
    for got, want in zip(found[0][name], expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert found[1][name] == str(placement or Replicate())


def test_every_process_has_its_share_of_the_layers(found):
    assert found[1]["w_q"] == [[16, 32], "cpu"]


def test_shared_attention_is_that_of_one_process(found):
    attention = llmkern.MultiHeadAttention(16, 4)
    with torch.no_grad():
        for i, p in enumerate(attention.parameters()):
            p.copy_(torch.linspace(-1, 1, p.numel()).view(p.shape) * (i + 1) / 8)
    x = torch.linspace(-1, 1, 2 * 5 * 16).view(2, 5, 16)
    expected = attention(x, x, x, need_weights=False)[0]
    torch.testing.assert_close(found[0]["MultiHeadAttention"][0], expected, rtol=1e-5, atol=1e-6)


def test_plans_name_every_product_of_the_layers():
    plan = tensor_parallel_plan(build_model(tiny.config(objective="clm")))
    assert {path.rsplit(".", 1)[1] for path in plan} == {"w_q", "w_k", "w_v", "w_o", "w_gate", "w_up", "w_down"}
    assert len(plan) == 2 * 7


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(ValueError, match="model: expected attention or feed-forward of llmkern, got a model with"):
        parallelize(nn.Linear(3, 3), None)
