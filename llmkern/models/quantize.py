"""Whole models in int8."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmkern import check
from llmkern.int8 import calibration as calibrate
from llmkern.int8 import cost
from llmkern.int8.module import Int8Linear
from llmkern.int8.replace import replace_linears, to_replace
from llmkern.int8.scheme import Int8Scheme, named


def quantize_model(
    model: nn.Module,
    bits: int = 8,
    *,
    scheme: Int8Scheme | str = "outliers",
    skip: Sequence[str] = (),
    calibration: Iterable[Any] | None = None,
    rows: Sequence[int] = cost.ROWS,
    measure: bool = True,
    progress: bool = True,
) -> nn.Module:
    """Replaces the nn.Linear layers of the model by `Int8Linear`, in place, and returns the model.

    bits: 8. scheme: an Int8Scheme, or the name of one: "outliers" (the default: 8 bits for each row, outliers in a
    second digit), "row", "symmetric", "groups", "rotated", "weight_only", and with calibration data "static" and
    "smooth". skip: names of layers to leave: "lm_head" (a whole name or its last parts) or a pattern, "layers.0.*". A
    model that is itself an nn.Linear comes back as an Int8Linear. Layers that share a weight share its int8 form; one
    whose weight something else uses too (an embedding) is left, and so is a subclass of nn.Linear or a layer with
    hooks.

    calibration: inputs of the model, each a dict of keywords, a tuple of arguments or one argument; a few batches of
    ordinary data. The model runs over them as it is, with a progress bar (progress=False: without); the report then
    tells each layer's output error against floating point.
    measure: leaves layers that int8 would not make faster here, on a CPU, with calls of each number of `rows`, by a
    model of the machine (llmkern.int8.cost) that is measured at the first use. False: replaces all, the same ones
    everywhere.

    `model.quantization_report` says what was done and why; printed, it is a table. The quantised model is saved by its
    state_dict (torch.save, or safetensors' save_model) and loaded into a model that went through `quantize_like(model,
    state_dict)`; a checkpoint of the model before loads into it as well.

    Raises TypeError for what is no module, for names that are no strings and for weights that are not float32, bfloat16
    or float16; ValueError for other bits, an unknown scheme, one that needs calibration data without any, for a name in
    skip that fits no layer, and for weights on the meta device. Nothing is replaced then. Source of the schemes: see
    Int8Scheme.
    """
    scheme = named(scheme)
    if calibration is not None and (isinstance(calibration, Tensor) or not isinstance(calibration, Iterable)):
        raise TypeError(f"calibration: expected an iterable of inputs of the model, got {type(calibration).__name__}")
    check.flag("measure", measure)
    check.flag("progress", progress)
    sizes = _rows(rows)
    if scheme.calibrated and calibration is None:
        raise ValueError(f"calibration: expected inputs of the model for this scheme, got None ({scheme})")
    skip = list(skip) if isinstance(skip, Iterable) and not isinstance(skip, str) else skip
    to_replace(model, bits, skip)  # all that can be refused is, before the model runs
    seen: dict[nn.Linear, calibrate.Seen] = {}
    smoothed: set[nn.Linear] = set()

    def keep(linear: nn.Linear) -> str:
        if linear not in seen and scheme.inputs == "static":
            return "the calibration data did not reach it"
        if not measure or linear.weight.device.type != "cpu":
            return ""
        verdict = cost.compare(linear.in_features, linear.out_features, linear.weight.dtype, scheme, sizes)
        return "" if verdict.pays else str(verdict)

    def finish(linear: nn.Linear, made: Int8Linear) -> tuple[float | None, str]:
        note = "smoothed" if linear in smoothed else ""
        found = seen.get(linear)
        if found is None:
            return None, note
        if made.input_scale is not None:
            made.input_scale.copy_(found.static_scale())
        return _output_error(linear, made, found), note

    if calibration is not None:
        batches = list(calibration)
        seen = calibrate.collect(model, batches, progress, scheme.rotate)
        if scheme.smooth is not None:
            linears, reasons = to_replace(model, bits, skip, keep)
            replaced = {linear for _, linear in linears if not reasons[id(linear)]}
            for fold in calibrate.observe(model, batches[0]):
                changed = {*fold.readers, fold.maker} if isinstance(fold.maker, nn.Linear) else set(fold.readers)
                if changed <= replaced and calibrate.smooth(fold, seen, scheme.smooth):
                    smoothed.update(fold.readers)
            if scheme.inputs == "static" and smoothed:  # of other ranges now
                seen = calibrate.collect(model, batches, progress, scheme.rotate)
    return replace_linears(model, Int8Linear, scheme, bits, skip, keep, finish)


def quantize_like(
    model: nn.Module, state_dict: dict[str, Tensor], *, scheme: Int8Scheme | str | None = None
) -> nn.Module:
    """Gives a model the int8 layers that a state_dict of a quantised one has, so that it loads; returns the model.

    What `quantize_model` leaves on one machine, since int8 would not pay there, it may replace on another; here the
    layers are those saved, and a layer whose weight one of those shares. scheme: by default each layer's own, which the
    state_dict tells. Load the state_dict afterwards.

    Raises ValueError where the state_dict has no int8 layer, or one that is no nn.Linear of the model.
    """
    ending = "weight_scale"
    names = {name[: -len(ending)].rstrip(".") for name in state_dict if name.split(".")[-1] == ending}
    linears = {n: m for n, m in model.named_modules(remove_duplicate=False) if type(m) is nn.Linear}
    unknown = names - set(linears)
    if not names or unknown:
        came = f"one with {sorted(unknown)[0]!r}" if unknown else "one without"
        raise ValueError(f"state_dict: expected int8 layers that are linear layers of the model, got {came}")
    schemes: dict[str, Int8Scheme] = {}
    for name in sorted(names):
        saved = state_dict.get(f"{name}.saved_scheme".lstrip("."))
        chosen = named(scheme) if scheme is not None else Int8Scheme()
        if scheme is None and saved is not None:
            chosen = Int8Scheme.from_numbers(saved.tolist())
        # A checkpoint of shared tensors may name one of the layers that share a weight alone.
        schemes |= {n: chosen for n, m in linears.items() if n == name or m.weight is linears[name].weight}
    return replace_linears(model, Int8Linear, schemes, skip=[name for name in linears if name not in schemes])


def _rows(rows: Sequence[int]) -> tuple[int, ...]:
    if isinstance(rows, (str, int)) or not isinstance(rows, Sequence):
        raise TypeError(f"rows: expected a sequence of positive integers, got {rows!r}")
    if not rows:
        raise ValueError(f"rows: expected at least one number of rows, got {rows!r}")
    for size in rows:
        check.positive("rows", size)
    return tuple(rows)


@torch.no_grad()
def _output_error(linear: nn.Linear, made: Int8Linear, seen: calibrate.Seen) -> float | None:
    if not seen.rows:
        return None
    x = torch.cat(seen.rows)
    truth = F.linear(x.double(), linear.weight.double())
    difference = made(x).double() - truth
    if made.bias is not None:
        difference -= made.bias.double()
    return float(difference.norm() / truth.norm().clamp(min=torch.finfo(torch.float64).tiny))
