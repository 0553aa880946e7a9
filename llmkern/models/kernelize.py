"""Existing models on the kernels: one call changes the model itself, another changes it back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from llmkern import check
from llmkern.attention import module as attention
from llmkern.attention import reference as plain_attention
from llmkern.models import decoder_layer, huggingface, rotary, structure
from llmkern.models.swap import as_exchanged, change_back, exchange, exchanged
from llmkern.norm.module import LayerNorm, RMSNorm
from llmkern.positional import module as positional
from llmkern.positional import reference as plain_positional
from llmkern.table import in_columns
from llmkern.transformer.layers import FusedAttention, FusedDecoderLayer, FusedEncoder, FusedEncoderLayer
from llmkern.verify import verify as hold

#: Classes that are exchanged as they are, and the attributes that the new one needs besides.
CLASSES: dict[type[nn.Module], tuple[type[nn.Module], dict[str, Any]]] = {
    plain_attention.MultiHeadAttention: (attention.MultiHeadAttention, {}),
    plain_positional.PositionalEncoding: (positional.PositionalEncoding, {"dropout": 0.0, "scale": 1.0}),
    plain_positional.RotaryEmbedding: (positional.RotaryEmbedding, {}),
    nn.LayerNorm: (LayerNorm, {}),
    nn.RMSNorm: (RMSNorm, {}),
    nn.MultiheadAttention: (FusedAttention, {}),
    nn.TransformerEncoderLayer: (FusedEncoderLayer, {}),
    nn.TransformerDecoderLayer: (FusedDecoderLayer, {}),
    # Nothing but torch's own function for inference takes the nested tensors that it would make of padding.
    nn.TransformerEncoder: (FusedEncoder, {"use_nested_tensor": False}),
}
_OURS = tuple(into for into, _ in CLASSES.values())
_REPORT = "_llmkern_report"


@dataclass(frozen=True)
class Replacement:
    """One module: what became of it."""

    name: str  #: its path in the model; empty for the model itself
    kind: str  #: its class before
    by: str  #: what serves it now; empty where it was left
    left: str = ""  #: why it was left


@dataclass
class Report:
    """What `kernelize` did, or would do; printed, a table."""

    modules: list[Replacement] = field(default_factory=list)
    dry_run: bool = False
    verification: Any = None  #: what `verify` found, where it was asked for

    @property
    def replaced(self) -> list[str]:
        return [m.name for m in self.modules if m.by]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In a process that loads a pickled model its attention must be known before it runs."""
        vars(self).update(state)
        if any(m.by.startswith("attn_implementation") for m in self.modules):
            huggingface.register()

    def __str__(self) -> str:
        lines = [("module", "class", "")]
        for m in self.modules:
            lines.append((m.name or "(the model)", m.kind, m.by or f"left: {m.left}"))
        table = in_columns(lines)
        done = "would be replaced" if self.dry_run else "replaced"
        table.append(f"{len(self.replaced)} of {len(self.modules)} modules that kernels might serve {done}")
        return "\n".join(table if self.verification is None else [*table, str(self.verification)])


def kernelize(model: nn.Module, *, dry_run: bool = False, verify: Any = None) -> Report:
    """Puts everything in the model that the kernels serve on them, in place; returns a report.

    model: any nn.Module, which itself is changed where it is one that is served: modules of llmkern.reference, torch's
    LayerNorm, RMSNorm, MultiheadAttention and Transformer layers, and of Hugging Face models the attention, rotary
    embeddings, RMSNorms and gated feed-forward layers. Parameters, buffers, state_dict, hooks and the objects stay;
    what changes is the forward. Subclasses, modules with a forward of their own and everything unknown are left as they
    are; the report says so where a kernel might have served.

    dry_run: changes nothing and reports what would be done. verify: inputs of the model (a tuple of arguments, a dict
    of keywords, or one argument), on which its outputs before and after are held to the numerical contract
    (`llmkern.verify`) in the mode that it is in; where they do not keep it, the model is changed back and RuntimeError
    raised.

    `report(model)` gives the report again, `restore(model)` changes the model back. Raises TypeError where model is no
    module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    check.flag("dry_run", dry_run)
    with structure.in_float32():
        found = _plan(model)
    result = Report([made for made, _ in found], dry_run)
    if dry_run:
        return result
    if verify is not None:
        dropping = [n for n, m in model.named_modules() if isinstance(m, nn.Dropout) and m.training and m.p > 0.0]
        if dropping:
            raise ValueError(
                f"verify: expected a model that drops nothing (model.eval()), got one whose {dropping[0]} does"
            )
    before = None if verify is None else restore(copy.deepcopy(model))  # also of what an earlier call has changed
    try:
        for _, change in found:
            if change is not None:
                change()
        if verify is not None:
            result.verification = _held(model, before, verify)
    except BaseException:
        restore(model)
        raise
    if result.verification is not None and not result.verification:
        restore(model)
        raise RuntimeError(f"kernelize: the model does not keep the contract, and was changed back\n{result}")
    earlier = vars(model).get(_REPORT)
    if earlier is not None:  # what was done then is still so
        done = [m for m in earlier.modules if m.by]
        names = {m.name for m in done}
        result.modules = [*done, *(m for m in result.modules if m.name not in names)]
    vars(model)[_REPORT] = result
    return result


def report(model: nn.Module) -> Report:
    """The report of the last `kernelize` of this model. Raises ValueError for a model that was not kernelized."""
    found = vars(model).get(_REPORT) if isinstance(model, nn.Module) else None
    if not isinstance(found, Report):
        raise ValueError("model: expected one that llmkern.kernelize has changed, got one that it has not")
    return found


def restore(model: nn.Module) -> nn.Module:
    """Undoes `kernelize` in place, for the model and everything in it; returns the model.

    Raises TypeError where model is no module, and ValueError, with nothing changed, where something else, such as
    torch's fully_shard, has exchanged a module's class since.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if exchanged(module) is not None and not as_exchanged(module):
            came = f"{name or 'the model'!r}, which has become a {type(module).__name__} since"
            raise ValueError(f"model: expected one whose modules are as kernelize left them, got {came}")
    for module in model.modules():
        if exchanged(module) is not None:
            change_back(module)
        huggingface.restore_attention(module)
        vars(module).pop(_REPORT, None)
    return model


def _plan(model: nn.Module) -> list[tuple[Replacement, Callable[[], None] | None]]:
    """For each module that kernels might serve: what becomes of it, and what does it."""
    found: list[tuple[Replacement, Callable[[], None] | None]] = []
    models: list[str] = []  # of transformers, by their paths
    for name, module in model.named_modules():
        if exchanged(module) is not None:
            continue
        kind = type(module).__name__
        into, attributes, left = _choice(model, name, module)
        if into is not None:
            found.append((Replacement(name, kind, into.__name__), partial(exchange, module, into, **attributes)))
        elif left:
            found.append((Replacement(name, kind, "", left), None))
        if any(name.startswith(f"{outer}." if outer else "") for outer in models):
            continue  # its attention is that of the model around it
        of_model, reason = huggingface.attention_change(module)
        if of_model is not None or reason:
            models.append(name)
        if of_model is not None:
            found.append((Replacement(name, kind, "attn_implementation='llmkern'"), of_model))
        elif reason:
            found.append((Replacement(name, kind, "", reason), None))
    return found


def _choice(model: nn.Module, name: str, module: nn.Module) -> tuple[type[nn.Module] | None, dict[str, Any], str]:
    """The class that a module gets, its attributes, or why it gets none (empty: no kernel has to do with it)."""
    kind = type(module)
    if kind in CLASSES:
        into, attributes = CLASSES[kind]
        return (None, {}, structure.OWN_FORWARD) if "forward" in vars(module) else (into, attributes, "")
    if isinstance(module, tuple(CLASSES)) and not isinstance(module, _OURS):
        parents = [k for k in CLASSES if isinstance(module, k)]
        return None, {}, f"a subclass of {parents[0].__name__}, whose forward may be another"
    for look, forward in ((structure.rms_norm, structure.FusedRMSNorm), (structure.gated, structure.FusedGated)):
        needs = look(module)
        if isinstance(needs, str):
            return None, {}, needs
        if needs is not None:
            return structure.fused_class(kind, forward), needs, ""
    layer = decoder_layer.known(model, name, module)
    if layer is not None:
        return structure.fused_class(kind, decoder_layer.FusedDecoderLayer), layer, ""
    rotating = rotary.attention(model, name, module)
    return (None, {}, rotating) if isinstance(rotating, str) else (rotating, {}, "")


def _held(model: nn.Module, before: Any, verify: Any) -> Any:
    """The contract on the outputs before and after, but for caches, which hold what the outputs come from."""
    args, kwargs = (
        ((), verify) if isinstance(verify, dict) else (verify if isinstance(verify, tuple) else (verify,), {})
    )

    return hold(_Outputs(model), _Outputs(before), args, kwargs, gradients=False)


class _Outputs(nn.Module):
    """A model without the caches among its outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return huggingface.without_caches(self.model(*args, **kwargs))
