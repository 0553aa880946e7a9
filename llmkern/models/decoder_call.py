"""A decoder layer whose linear layers are int8, as one call of csrc/layer/decoder.h, on a CPU, in inference.

Between two kernels of one token, which take 10 to 40 us each, Python and torch's dispatcher take as long again, and
the other threads fall asleep. q, k and v are one product here, gate and up another, whose packed weights stand in for
those of the single layers. The result has the same bits as the layer's own forward in float32; in 16 bits it is rounded
less often, since residuals are added before.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as every

from llmkern import check, extension, monitoring
from llmkern.int8 import packing
from llmkern.int8.module import Int8Linear
from llmkern.int8.scheme import ACTIVATIONS, INPUTS
from llmkern.models import cache_room
from llmkern.operator import call_key, is_compiling

#: What a model may tell its layers besides; anything else that is neither None nor False is for its own forward.
_TOLD = {"use_cache", "position_ids", "cache_position", "output_router_logits", "logits_to_keep", "tokenizer"}
#: The parts of a layer, of its attention and of its feed-forward layer.
PARTS = ("input_layernorm", "post_attention_layernorm", "self_attn", "mlp")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED = ("gate_proj", "up_proj", "down_proj")
_LINEARS = (*PROJECTIONS, *FEED)
#: Products of one call: the layers whose weights lie one behind the other.
_PRODUCTS = (PROJECTIONS[:3], PROJECTIONS[3:], FEED[:2], FEED[2:])


class Kept:
    """What a layer keeps from call to call; a copy or a pickle of it is empty."""

    def __init__(self) -> None:
        self.weights: Weights | None = None

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()

    def __deepcopy__(self, memo: Any) -> Kept:
        return Kept()


class Weights:
    """The packed weights of a layer as it is now, and plans for calls by their metadata."""

    def __init__(self, head_dim: int, modules: tuple[Any, ...]) -> None:
        self.forgotten, self.isa = packing.forgotten(), extension._C.active_isa()
        self.modules = modules
        self.seen = [(b, b._version, b.data_ptr()) for m in self.modules[4:] for b in _tensors(m)]
        linears = dict(zip(_LINEARS, self.modules[4:], strict=True))
        self.heads, self.kv_heads = (linears[n].out_features // head_dim for n in PROJECTIONS[:2])
        self.plans: dict[bytes, Any] = {}
        self.linears: list[tuple[int, int, Any, int]] = []
        tensors: list[Tensor | None] = []
        codes = extension.DTYPE_CODES
        for names in _PRODUCTS:
            parts = [linears[name] for name in names]
            weight, scale = (_end_to_end([getattr(m, n) for m in parts]) for n in ("weight", "weight_scale"))
            bias = None if parts[0].bias is None else _end_to_end([m.bias for m in parts])
            inputs, group = parts[0].scheme.inputs, parts[0].scheme.group
            quantization = extension._C.Quantization(INPUTS[inputs], inputs == "outliers", group, 1)
            if group:
                scale = scale.t().contiguous()
            self.linears.append((*weight.shape, quantization, 0 if bias is None else codes[bias.dtype]))
            tensors += [packing.pack(weight, group, names[0] == "gate_proj"), scale, bias]
        self.tensors = tuple(tensors)

    def holds(self, modules: tuple[Any, ...]) -> bool:
        """Whether they are those of a layer of these modules still."""
        if self.forgotten != packing.forgotten() or self.isa != extension._C.active_isa():
            return False
        for a, b in zip(modules, self.modules, strict=True):
            if a is not b or _hooked(a):
                return False
        i = 0
        for m in modules[4:]:
            for t in _tensors(m):
                tensor, version, address = self.seen[i]
                if t is not tensor or t._version != version or t.data_ptr() != address:
                    return False
                i += 1
        return i == len(self.seen)


_parts, _projections, _feed = (itemgetter(*names) for names in (PARTS, PROJECTIONS, FEED))


def _modules(layer: Any) -> tuple[Any, ...]:
    """The modules of PARTS, and the linear layers in the order of _LINEARS."""
    parts = _parts(layer._modules)
    return (*parts, *_projections(parts[2]._modules), *_feed(parts[3]._modules))


def _tensors(linear: Any) -> list[Tensor]:
    buffers = linear._buffers
    bias = linear._parameters.get("bias")
    return [buffers["weight"], buffers["weight_scale"], *(() if bias is None else (bias,))]


def _end_to_end(parts: list[Tensor]) -> Tensor:
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).detach().contiguous()


def weights_of(layer: Any) -> Weights | None:
    """The packed weights, made anew where a layer has changed; None where they are not all int8 of one kind."""
    kept: Kept = layer._llmkern_kept
    found, kept.weights = kept.weights, None
    try:
        modules = _modules(layer)
    except (AttributeError, KeyError):  # another module took the place of one
        return None
    if found is not None and found.holds(modules):
        kept.weights = found
        return found
    linears = dict(zip(_LINEARS, modules[4:], strict=True))
    if any(type(m) is not Int8Linear for m in linears.values()) or any(map(_hooked, modules)):
        return None
    for names in _PRODUCTS:
        parts = [linears[name] for name in names]
        alike = {(m.scheme.inputs, m.scheme.group, None if m.bias is None else m.bias.dtype) for m in parts}
        if len(alike) > 1 or any(m.input_scale is not None or m.rotation != 1 for m in parts):
            return None
    tensors = [t for m in linears.values() for t in _tensors(m)]
    if any(t.device.type != "cpu" or t.is_inference() for t in tensors):  # those of inference tell no change
        return None
    kept.weights = Weights(layer.self_attn.head_dim, modules)
    return kept.weights


def _hooked(m: Any) -> bool:
    """Whether something else than its class's forward runs with it in inference."""
    return bool(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m))


def call(layer: Any, gate: str, norms: Any, hidden: Tensor, arguments: dict[str, Any]) -> Tensor | None:
    """The layer's output where one call serves it, with its tokens in the cache; else None, with nothing changed.

    gate: swiglu or geglu. norms: eps and offset of the two. arguments: those of the layer's forward by their names.
    """
    if torch.is_grad_enabled() or is_compiling() or layer.training or not extension.SHORT_CALLS:
        return None
    tables, mask, cache = (arguments.get(n) for n in ("position_embeddings", "attention_mask", "past_key_values"))
    for name, value in arguments.items():
        if name not in _KNOWN and value is not None and value is not False:
            return None
    if type(tables) is not tuple or len(tables) != 2:
        return None
    if every._global_forward_hooks or every._global_forward_pre_hooks:
        return None
    key = call_key(hidden, *tables, mask)
    weights = None if key is None else weights_of(layer)
    if key is None or weights is None:
        return None
    plan = weights.plans.get(key)
    if plan is None:
        plan = weights.plans[key] = _plan(layer, weights, gate, norms, hidden, tables, mask)
    if plan is False:
        return None
    attention_norm, feed_norm = (m._parameters["weight"] for m in weights.modules[:2])
    if attention_norm.dtype != hidden.dtype or feed_norm.dtype != hidden.dtype:
        return None
    length, past, of_cache = hidden.shape[1], 0, None
    blocks: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
    if cache is not None:
        of_cache = cache_room.layer_of(cache, layer.self_attn.layer_idx)
        if of_cache is None:
            return None
        past = cache_room.length_of(of_cache)
    if mask is None:
        if past and length > 1:
            return None
    elif mask.shape[3] != past + length:
        return None
    if of_cache is not None:
        found = cache_room.room(of_cache, past, length, hidden, weights.kv_heads, layer.self_attn.head_dim)
        if found is None:
            return None
        blocks = found
    out = torch.empty_like(hidden)
    run = extension._C.decoder_layer
    if monitoring.current is not None:
        run = monitoring.current.counting("decoder_layer", "cpu", False, run)
    run(
        plan, extension.threads(), past, hidden, out, *tables, mask, *blocks, attention_norm, feed_norm,
        *weights.tensors,
    )  # fmt: skip
    if of_cache is not None:
        cache_room.fill(of_cache, blocks, past + length)  # type: ignore[arg-type]
    return out


_KNOWN = {"position_embeddings", "attention_mask", "past_key_values", *_TOLD}


def _plan(
    layer: Any, weights: Weights, gate: str, norms: Any, hidden: Tensor, tables: tuple[Tensor, Tensor],
    mask: Tensor | None,
) -> Any:  # fmt: skip
    """What the kernels are told of calls with this metadata; False where they are for the layer's own forward."""
    width, head = weights.linears[0][1], layer.self_attn.head_dim
    if hidden.dim() != 3 or hidden.dtype not in check.FLOATS or hidden.device.type != "cpu":
        return False
    batch, length, own = hidden.shape
    if own != width or not hidden.is_contiguous() or not hidden.numel():
        return False
    for t in tables:
        if t.dtype != hidden.dtype or t.shape not in ((1, length, head), (batch, length, head)) or t.stride(2) != 1:
            return False
    if tables[0].shape != tables[1].shape or tables[0].stride() != tables[1].stride():
        return False
    if mask is not None:
        fits = mask.dim() == 4 and mask.shape[0] in (1, batch) and mask.shape[1] in (1, weights.heads)
        if mask.dtype != torch.bool or not fits or mask.shape[2] not in (1, length):
            return False
    (eps, offset), (feed_eps, feed_offset) = norms
    return extension._C.DecoderLayerPlan(
        batch=batch, length=length, width=width, heads=weights.heads, kv_heads=weights.kv_heads, head_width=head,
        linears=weights.linears, gate=ACTIVATIONS[gate], scale=layer.self_attn.scaling, eps=(eps, feed_eps),
        offset=(offset, feed_offset), dtype=extension.DTYPE_CODES[hidden.dtype],
    )  # fmt: skip
