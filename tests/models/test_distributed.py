"""Kernelized models under DDP and FSDP2, on two gloo processes: outputs, gradients and a step are the plain model's."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

import llmkern
from llmkern.models.swap import change_back, exchanged
from llmkern.verify import verify

transformers = pytest.importorskip("transformers", minversion="5")

WORLD = 2
RATE = 0.1
PADDING = torch.arange(7).expand(4, 7) >= torch.tensor([[7], [4], [5], [1]])


class Encoder(nn.Module):
    """Two of torch's encoder layers over padded sequences."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True, norm_first=True)
        self.model = nn.TransformerEncoder(layer, 2, nn.LayerNorm(32), enable_nested_tensor=False)
        generator = torch.Generator().manual_seed(2)
        self.inputs = torch.randn(len(PADDING), 7, 32, generator=generator)

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.layers

    def forward(self, rows: slice) -> torch.Tensor:
        x = self.inputs[rows].to(next(self.parameters()).dtype)
        hidden = self.model(x, src_key_padding_mask=PADDING[rows])
        return hidden * ~PADDING[rows, :, None]


class Decoder(nn.Module):
    """A small Llama."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.LlamaConfig(
            vocab_size=60, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
            intermediate_size=64, attn_implementation="eager",
        )  # fmt: skip
        self.model = transformers.LlamaForCausalLM(config)
        self.inputs = torch.randint(60, (len(PADDING), 7), generator=torch.Generator().manual_seed(2))

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.model.layers

    def forward(self, rows: slice) -> torch.Tensor:
        return self.model(self.inputs[rows], use_cache=False).logits


MODELS = {"encoder": Encoder, "decoder": Decoder}
INT8 = "decoder in int8"  # what is no linear layer trains
#: What wraps the model, and whether it is kernelized before that or after.
WAYS = ["DDP, kernelized before", "DDP, kernelized after", "FSDP2, kernelized before", "FSDP2, kernelized after"]


def made(name: str) -> nn.Module:
    torch.manual_seed(1)
    model = (Decoder if name == INT8 else MODELS[name])().train()
    with torch.no_grad():
        for p in model.parameters():  # norms begin with ones, in which much hides
            p.add_(0.05 * torch.randn_like(p))
    if name == INT8:
        llmkern.kernelize(model)
        llmkern.quantize_model(model, skip=("lm_head",), measure=False, progress=False)
    return model


def rows_of(rank: int) -> slice:
    each = len(PADDING) // WORLD
    return slice(rank * each, (rank + 1) * each)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Of a sharded tensor all of it."""
    found = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return found.detach().clone()


def sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def step(model: nn.Module, rows: slice) -> dict[str, torch.Tensor]:
    """The output, every gradient and, after a step of gradient descent, every parameter."""
    output = model(rows)
    output.square().mean().backward()
    inner = getattr(model, "module", model)
    found = {"output": output.detach()}
    found |= {f"gradient of {n}": whole(p.grad) for n, p in inner.named_parameters()}
    torch.optim.SGD(model.parameters(), lr=RATE).step()
    return found | {f"{n} after a step": whole(p) for n, p in inner.named_parameters()}


def work(rank: int, folder: str) -> None:
    """One of the processes; the first writes what all found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    for name in [*MODELS, INT8]:
        for way in WAYS if name != INT8 else WAYS[::2]:
            model = made(name)
            if way.endswith("before"):
                llmkern.kernelize(model)
            wrapped = DistributedDataParallel(model) if way.startswith("DDP") else sharded(model)
            if way.endswith("after"):
                llmkern.kernelize(wrapped)
            reported = llmkern.report(model if way.endswith("before") else wrapped)
            found = step(wrapped, rows_of(rank))
            outputs = [torch.empty_like(found["output"]) for _ in range(WORLD)]
            dist.all_gather(outputs, found["output"])
            if rank == 0:
                torch.save(found | {"output": torch.cat(outputs)}, f"{folder}/{name}, {way}.pt")
                modules = [[m.name, m.kind, m.by, m.left] for m in reported.modules]
                Path(f"{folder}/{name}, {way}.json").write_text(json.dumps(modules))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have written what every model gave under every wrapper."""
    path = tmp_path_factory.mktemp("distributed")
    spawn(work, (str(path),), nprocs=WORLD)
    return path


def with_replaced(name: str, replaced: set[str]) -> nn.Module:
    """The model in one process, these modules of it kernelized and no other."""
    model = made(name)
    llmkern.kernelize(model)
    for path, module in model.named_modules():
        if exchanged(module) is not None and path not in replaced:
            change_back(module)
    return model


def alone(model: nn.Module) -> dict[str, torch.Tensor]:
    """What the model gives in one process: the gradients' mean over the parts of the batch."""
    parts = [step(copy.deepcopy(model), rows_of(rank)) for rank in range(WORLD)]
    found = {"output": torch.cat([p["output"] for p in parts])}
    for n, p in model.named_parameters():
        gradient = torch.stack([part[f"gradient of {n}"] for part in parts]).mean(0)
        found |= {f"gradient of {n}": gradient, f"{n} after a step": p.detach().add(gradient, alpha=-RATE)}
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_results_are_those_of_one_process_and_keep_the_contract(name, way, folder):
    found = torch.load(folder / f"{name}, {way}.pt")
    modules = json.loads((folder / f"{name}, {way}.json").read_text())
    paths = {path.removeprefix("module.") for path, _, by, _ in modules if by}
    model = with_replaced(name, paths)
    expected = alone(model)
    assert found.keys() == expected.keys() and len(found) > 20
    for key, value in found.items():
        assert torch.equal(value, expected[key]), key
    verify(model, made(name), (rows_of(1),)).raise_if_failed()


@pytest.mark.parametrize("way", WAYS[::2])
def test_around_int8_layers_they_are_too(way, folder):
    found, expected = torch.load(folder / f"{INT8}, {way}.pt"), alone(made(INT8))
    assert found.keys() == expected.keys() and len(found) == 1 + 2 * 7  # embedding, head and five norms
    for key, value in found.items():
        assert torch.equal(value, expected[key]), key


KINDS = {
    "encoder": {"TransformerEncoder", "TransformerEncoderLayer", "MultiheadAttention", "LayerNorm"},
    "decoder": {"LlamaForCausalLM", "LlamaMLP", "LlamaRMSNorm"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_served_under_a_wrapper(name, way, folder):
    """FSDP2 makes a subclass of what it wraps: what has become one is left, and told."""
    modules = json.loads((folder / f"{name}, {way}.json").read_text())
    left = {kind: reason for _, kind, by, reason in modules if not by}
    if way == "FSDP2, kernelized after" and name == "encoder":
        assert left.keys() == {"FSDPTransformerEncoderLayer"} and "a subclass of" in left.popitem()[1]
        assert {kind for _, kind, by, _ in modules if by} == KINDS[name] - {"TransformerEncoderLayer"}
    else:
        assert not left and {kind for _, kind, _, _ in modules} >= KINDS[name]


def test_what_was_sharded_since_cannot_be_restored(tmp_path):
    """Its class is FSDP2's now: changed back it would be a model whose shards nobody gathers."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = made("encoder")
        llmkern.kernelize(model)
        fully_shard(model.layers[1], mesh=init_device_mesh("cpu", (1,)))
        kinds = [type(m) for m in model.modules()]
        with pytest.raises(ValueError, match=r"model: expected one .* got 'model.layers.1', .* FSDPFusedEncoderLayer"):
            llmkern.restore(model)
        assert [type(m) for m in model.modules()] == kinds
    finally:
        dist.destroy_process_group()
