"""Replacing the linear layers of a model, tied weights kept tied, with a report of what was done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from llmkern import check
from llmkern.int8.scheme import Int8Scheme
from llmkern.table import in_columns


@dataclass(frozen=True)
class LayerReport:
    """One linear layer: what became of it."""

    name: str
    shape: tuple[int, ...]  #: (out_features, in_features)
    left: str  #: why it was left as it was; empty where it was replaced
    bytes_before: int
    bytes_after: int
    error: float  #: root mean square of the weights' rounding error over that of the weights
    #: That of the outputs over calibration data, against the layer in floating point; None without such data.
    output_error: float | None = None
    note: str = ""  #: what was measured, in words


@dataclass
class QuantizationReport:
    """What `quantize_model` did; printed, a table."""

    layers: list[LayerReport] = field(default_factory=list)

    @property
    def replaced(self) -> list[str]:
        return [layer.name for layer in self.layers if not layer.left]

    def __str__(self) -> str:
        before, after = (sum(getattr(layer, f"bytes_{when}") for layer in self.layers) for when in ("before", "after"))
        measured = any(layer.output_error is not None for layer in self.layers)
        lines = [("layer", "shape", "MB", "int8 MB", "weight error", *(["output error"] if measured else []), "")]
        for layer in self.layers:
            size = "x".join(map(str, layer.shape))
            numbers = [f"{layer.bytes_before / 1e6:.2f}", f"{layer.bytes_after / 1e6:.2f}", f"{layer.error:.2%}"]
            if measured:
                numbers.append("" if layer.output_error is None else f"{layer.output_error:.2%}")
            outcome = f"left: {layer.left}" if layer.left else f"int8{layer.note and ', ' + layer.note}"
            lines.append((layer.name or "(the model)", size, *numbers, outcome))
        total = f"{len(self.replaced)} of {len(self.layers)} linear layers in int8, {before / 1e6:.1f} MB before and "
        return "\n".join([*in_columns(lines), f"{total}{after / 1e6:.1f} MB after"])


def replace_linears(
    model: nn.Module,
    kind: Any,
    scheme: Int8Scheme | Mapping[str, Int8Scheme],
    bits: int = 8,
    skip: Iterable[str] = (),
    keep: Callable[[nn.Linear], str] = lambda linear: "",
    finish: Callable[[nn.Linear, Any], tuple[float | None, str]] = lambda linear, made: (None, ""),
) -> nn.Module:
    """Replaces every nn.Linear in place and attaches `quantization_report` to the model that it returns.

    kind: the new layers' class, an Int8Linear; values and scales are made once for a weight that several layers share.
    scheme: of all layers, or by their names. keep: why a layer, which could be replaced, is left; empty: it is not.
    finish(old, new): sets what calibration found, gives the output's error and a note for the report.
    skip: names to leave, "lm_head" (a whole name or its last parts) or a pattern, "layers.0.*".

    Raises TypeError for what is no module, for bits that are no integer, for names that are no strings and for weights
    that are not float32, bfloat16 or float16; ValueError for bits other than 8, for a name in skip that fits no layer,
    and for weights without values. Nothing is replaced then.
    """
    linears, reasons = to_replace(model, bits, skip, keep)
    quantized: dict[int, tuple[Tensor, Tensor]] = {}
    made: dict[int, nn.Module] = {}
    report = QuantizationReport()
    for name, linear in linears:
        if is_lazy(linear.weight):  # of a subclass, LazyLinear, whose sizes its first input gives
            report.layers.append(LayerReport(name, (0, 0), reasons[id(linear)], 0, 0, 0.0))
            continue
        before = linear.weight.numel() * linear.weight.element_size()
        reason = reasons[id(linear)]
        if reason:
            report.layers.append(LayerReport(name, tuple(linear.weight.shape), reason, before, before, 0.0))
            continue
        chosen = scheme if isinstance(scheme, Int8Scheme) else scheme[name]
        if id(linear.weight) not in quantized:
            quantized[id(linear.weight)] = kind.quantize(linear.weight, chosen)
        values, scale = quantized[id(linear.weight)]
        if id(linear) not in made:
            made[id(linear)] = kind.from_linear(linear, (values, scale), chosen)
        after = values.numel() + scale.numel() * scale.element_size()
        error = _weight_error(linear.weight, made[id(linear)])
        found = finish(linear, made[id(linear)])
        report.layers.append(LayerReport(name, tuple(linear.weight.shape), "", before, after, error, *found))
        if name:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, made[id(linear)])
    _leave_torchs_fused_layers(model, set(made.values()))
    result = made.get(id(model), model)
    result.quantization_report = report  # type: ignore[assignment]
    return result


def to_replace(
    model: nn.Module,
    bits: int = 8,
    skip: Iterable[str] = (),
    keep: Callable[[nn.Linear], str] = lambda linear: "",
) -> tuple[list[tuple[str, nn.Linear]], dict[int, str]]:
    """The linear layers by name, and by identity why each is left as it is; empty where it can be replaced.

    Raises as `replace_linears` does.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(bits, int) or isinstance(bits, bool):
        raise TypeError(f"bits: expected the integer 8, got {bits!r}")
    if bits != 8:
        raise ValueError(f"bits: expected the integer 8, got {bits}")
    if isinstance(skip, str):
        raise TypeError(f'skip: expected a sequence of names, ("{skip}",), got the string {skip!r}')
    names = list(skip) if isinstance(skip, Iterable) else None
    if names is None or not all(isinstance(name, str) for name in names):
        raise TypeError(f"skip: expected a sequence of names, got {skip!r}")
    linears = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.Linear)]
    reasons = _reasons(linears, names)
    _leave_tied(model, linears, reasons)
    for name, linear in linears:
        if not reasons[id(linear)]:
            check_weight(f"model: layer {name!r}" if name else "model", linear.weight)
    for _, linear in linears:
        reasons[id(linear)] = reasons[id(linear)] or keep(linear)
    _leave_tied(model, linears, reasons)
    return linears, reasons


def _weight_error(weight: Tensor, layer: Any) -> float:
    """Root mean square of the rounding error over that of the weight; a rotation changes neither."""
    given = weight.detach().float()
    if layer.rotation > 1:
        given = layer.rotated(given)
    difference = layer.dequantized() - given
    return float(difference.norm() / given.norm().clamp(min=torch.finfo(torch.float32).tiny))


def check_weight(what: str, weight: Tensor) -> None:
    """Raises where a layer, which the message calls `what`, has a weight that cannot be quantised."""
    if is_lazy(weight):
        raise ValueError(f"{what}: expected a weight with values, got one whose sizes the first input gives")
    if weight.dtype not in check.FLOATS:
        expected = " or ".join(map(check.short, check.FLOATS))
        raise TypeError(f"{what}: expected a weight of {expected}, got {check.short(weight.dtype)}")
    if weight.device.type == "meta":
        raise ValueError(f"{what}: expected a weight with values, got one on the device meta; load the model first")


def _leave_torchs_fused_layers(model: nn.Module, replaced: set[nn.Module]) -> None:
    """Torch's encoder would read the weights of new layers behind their backs, in inference, in one fused function.

    The encoder also packs a padded batch into a nested tensor, which nothing but that function takes.
    """
    for module in model.modules():
        if isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer)):
            if replaced.isdisjoint(module.modules()):
                continue
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False
            else:
                module.activation_relu_or_gelu = 0  # says that it is neither, which the fused function needs


def has_hooks(module: nn.Module) -> bool:
    """Whether something else than the module's forward runs with it."""
    return any(hooks for attribute, hooks in vars(module).items() if attribute.endswith("_hooks"))


def _reasons(linears: list[tuple[str, nn.Linear]], skip: list[str]) -> dict[int, str]:
    used = {pattern: False for pattern in skip}
    reasons: dict[int, str] = {}
    for name, linear in linears:
        reason = ""
        if type(linear) is not nn.Linear:
            reason = f"a {type(linear).__name__}, not an nn.Linear itself"
        elif has_hooks(linear):
            reason = "it has hooks"
        elif linear.weight._backward_hooks or linear.weight._post_accumulate_grad_hooks:
            reason = "its weight has hooks"
        elif "forward" in vars(linear):
            reason = "it has a forward of its own"
        for pattern in skip:
            if fnmatchcase(name, pattern) or f".{name}".endswith(f".{pattern}"):
                used[pattern], reason = True, "named in skip"
        reasons[id(linear)] = reasons.get(id(linear)) or reason
    for pattern, found in used.items():
        if not found:
            names = ", ".join(name for name, _ in linears[:8]) or "none"
            raise ValueError(f"skip: expected names of linear layers ({names}, ...), got {pattern!r}, which fits none")
    return reasons


def _leave_tied(model: nn.Module, linears: list[tuple[str, nn.Linear]], reasons: dict[int, str]) -> None:
    """A layer that is left, or anything else that has its weight, keeps the layers tied to it."""
    while True:
        owners: dict[int, str] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            for attribute, parameter in module._parameters.items():
                is_replaced = isinstance(module, nn.Linear) and not reasons[id(module)] and attribute == "weight"
                if parameter is not None and not is_replaced:
                    owners[id(parameter)] = f"{path}.{attribute}".lstrip(".")
        tied = [m for _, m in linears if not reasons[id(m)] and id(m.weight) in owners]
        if not tied:
            return
        for linear in tied:
            reasons[id(linear)] = f"its weight is also {owners[id(linear.weight)]}"
