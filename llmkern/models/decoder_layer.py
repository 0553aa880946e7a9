"""Decoder layers of Hugging Face models that are one call where their weights are int8, known by what they give.

As in llmkern.models.structure: a candidate is known by its parts, then its own forward is asked on random numbers, with
small layers of random weights in its parts' places. What reaches the attention interface and the cache is looked at
too, so that a model that tells these more than is known here (a cap of the scores, sinks) is left.
"""

from __future__ import annotations

import inspect
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmkern.activation import reference as plain_activation
from llmkern.models import decoder_call, huggingface, rotary, structure
from llmkern.models.decoder_call import FEED, PARTS, PROJECTIONS
from llmkern.norm import reference as plain_norm
from llmkern.positional import reference as plain_positional

_GATES = {"silu": "swiglu", "gelu": "geglu"}  #: the activations that a product can end with
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
#: What an attention may tell the interface besides: the mask says it already, or it is what the model was told.
_TOLD = {"sliding_window", "position_ids", "use_cache"}


class FusedDecoderLayer(nn.Module):
    """The forward of a decoder layer, for `structure.fused_class`: one call in inference on int8 weights on a CPU,
    and the model's own code, on its kernels, everywhere else."""

    _llmkern_gate: str
    _llmkern_norms: tuple[tuple[float, float], tuple[float, float]]
    _llmkern_kept: decoder_call.Kept

    def forward(self, *args: Any, **named: Any) -> Any:
        """hidden states (B, S, W), and what the model's own layer takes by name. Returns their shape and dtype."""
        if len(args) == 1 and self.self_attn.config._attn_implementation == huggingface.NAME:  # type: ignore[union-attr]
            made = decoder_call.call(self, self._llmkern_gate, self._llmkern_norms, args[0], named)
            if made is not None:
                return made
        return super().forward(*args, **named)


def known(model: nn.Module, name: str, module: Any) -> dict[str, Any] | None:
    """What FusedDecoderLayer needs of the module at this path of the model; None where it serves no such."""
    children = dict(module.named_children())
    if set(children) != set(PARTS) or "forward" in vars(module):
        return None
    if type(module).__new__ is not nn.Module.__new__:  # torch's fully_shard has wrapped it: it cannot be copied
        return None
    attention, mlp = children["self_attn"], children["mlp"]
    if set(dict(attention.named_children())) != set(PROJECTIONS) or not _fits(attention):
        return None
    turn = rotary.turn_of(model, f"{name}.self_attn" if name else "self_attn", attention)
    if not isinstance(turn, rotary.Turn) or not turn.halves or turn.interleaved:
        return None
    norms = [structure.rms_norm(children[n]) for n in PARTS[:2]]
    gated = structure.gated(mlp)
    if not isinstance(gated, dict) or gated["_llmkern_parts"].projections != FEED:
        return None
    gate = _GATES.get(gated["_llmkern_activation"])
    if gate is None or not all(isinstance(n, dict) for n in norms):
        return None
    numbers: list[tuple[Any, Any]] = [(n["_llmkern_eps"], n["_llmkern_offset"]) for n in norms]  # type: ignore[index]
    if not _computes(module, numbers, gated["_llmkern_activation"]):
        return None
    return {"_llmkern_gate": gate, "_llmkern_norms": tuple(numbers), "_llmkern_kept": decoder_call.Kept()}


def _fits(attention: Any) -> bool:
    """Whether its projections and numbers are those of heads that share keys."""
    linears = [getattr(attention, n) for n in PROJECTIONS]
    if not all(isinstance(m, structure.LINEAR) for m in linears):
        return False
    head, scaling = getattr(attention, "head_dim", None), getattr(attention, "scaling", None)
    if type(head) is not int or type(scaling) is not float or type(getattr(attention, "layer_idx", None)) is not int:
        return False
    if getattr(attention, "is_causal", None) is not True or not hasattr(attention, "config") or head % 2:
        return False
    q, k, v, o = linears
    if q.out_features % head or k.out_features % head or k.out_features != v.out_features:
        return False
    return o.in_features == q.out_features and q.out_features % k.out_features == 0


class _Interface:
    """In place of transformers' table of attentions: one that computes plainly and notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def get_interface(self, *names: Any) -> Any:
        return self._attend

    def __getitem__(self, name: str) -> Any:
        return self._attend

    def _attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, dropout: float = 0.0,
        scaling: float | None = None, **more: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        self.told.append((mask, dropout, scaling, {n for n, value in more.items() if value is not None}))
        return _attention(q, k, v, mask, scaling).transpose(1, 2), None


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scaling, enable_gqa=True)


class _Cache:
    """Three tokens, and what is put behind them."""

    def __init__(self, heads: int, width: int) -> None:
        self.keys, self.values = (structure.numbers((2, heads, 3, width), seed) for seed in (21, 22))
        self.given: list[tuple[Any, ...]] = []

    def update(self, key: Tensor, value: Tensor, layer: int, *more: Any, **named: Any) -> tuple[Tensor, Tensor]:
        self.given.append((layer, any(m is not None for m in (*more, *named.values()))))
        return torch.cat((self.keys, key), 2), torch.cat((self.values, value), 2)


@torch.no_grad()
def _computes(module: Any, norms: list[tuple[float, float]], activation: str) -> bool:
    """Whether a layer of these parts gives what the one call gives, asked at small sizes."""
    attention, mlp, head = module.self_attn, module.mlp, module.self_attn.head_dim
    width, middle = 24, 40
    kv = 2
    heads = kv * (attention.q_proj.out_features // attention.k_proj.out_features)
    shapes = {
        "q_proj": (heads * head, width), "k_proj": (kv * head, width), "v_proj": (kv * head, width),
        "o_proj": (width, heads * head), "gate_proj": (middle, width), "up_proj": (middle, width),
        "down_proj": (width, middle),
    }  # fmt: skip
    linear = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        of = attention if name in PROJECTIONS else mlp
        linear[name] = structure.random_linear(shape, getattr(of, name).bias is not None, seed + 11)
        linear[name].weight.mul_(shape[1] ** -0.5)
    weights = [structure.numbers((width,), seed) for seed in (8, 9)]
    asked_norms = [
        structure.stand_in(getattr(module, n), _parameters={"weight": nn.Parameter(w)})
        for n, w in zip(PARTS[:2], weights, strict=True)
    ]
    interface = _Interface()
    own: Any = inspect.unwrap(type(attention).forward)
    if not isinstance(own, types.FunctionType) or _INTERFACE not in own.__globals__:
        return False
    forward = structure.with_global(own, _INTERFACE, interface)
    projections = {n: linear[n] for n in PROJECTIONS}
    asked_attention = structure.stand_in(attention, _modules={**attention._modules, **projections})
    vars(asked_attention)["forward"] = types.MethodType(forward, asked_attention)
    asked_mlp = structure.stand_in(mlp, _modules={**mlp._modules, **{n: linear[n] for n in FEED}})
    parts = dict(zip(PARTS, (*asked_norms, asked_attention, asked_mlp), strict=True))
    asked = structure.stand_in(module, _modules=parts)

    x = structure.numbers((2, 5, width), 31)
    half = [structure.numbers((2, 5, head // 2), seed) for seed in (32, 33)]
    cos, sin = (torch.cat((t, t), -1) for t in half)
    mask = torch.ones(2, 1, 5, 8, dtype=torch.bool).tril(3)
    cache = _Cache(kv, head)
    told = {"attention_mask": mask, "position_embeddings": (cos, sin), "past_key_values": cache, "use_cache": True}
    given = structure.answer(asked, x, position_ids=torch.arange(3, 8).expand(2, 5), **told)
    if len(interface.told) != 1 or cache.given != [(attention.layer_idx, False)]:
        return False
    given_mask, dropout, scaling, others = interface.told[0]
    if given_mask is not mask or dropout or scaling != attention.scaling or not others <= _TOLD:
        return False

    def norm(t: Tensor, i: int) -> Tensor:
        eps, offset = norms[i]
        made: Tensor = plain_norm.norm(t, None, weights[i], None, eps, offset, False)[0]
        return made

    hidden = norm(x, 0)
    q, k, v = (linear[n](hidden).view(2, 5, -1, head).transpose(1, 2) for n in PROJECTIONS[:3])
    turned: Any = plain_positional.rotary(
        q, k, *(t.flatten(0, 1) for t in half), position_ids=torch.arange(10).view(2, 5)
    )  # fmt: skip
    q, k, v = turned[0], torch.cat((cache.keys, turned[1]), 2), torch.cat((cache.values, v), 2)
    attended = _attention(q, k, v, mask, attention.scaling).transpose(1, 2).reshape(2, 5, -1)
    between = x + linear["o_proj"](attended)
    hidden = norm(between, 1)
    gate, up = linear["gate_proj"](hidden), linear["up_proj"](hidden)
    return structure.agree(given, between + linear["down_proj"](plain_activation.gated(gate, up, activation)))
