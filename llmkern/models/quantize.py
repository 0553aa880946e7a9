"""Whole models in int8."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from llmkern.int8.module import Int8Linear
from llmkern.int8.replace import replace_linears
from llmkern.int8.scheme import Int8Scheme, named


def quantize_model(model: nn.Module, bits: int = 8, *, scheme: Int8Scheme | str = "outliers", skip: Sequence[str] = ()) -> nn.Module:
    """Replaces every nn.Linear of the model by an `Int8Linear`, in place, and returns the model.

    bits: 8. skip: names of layers to leave: "lm_head" (a whole name or its last parts) or a pattern, "layers.0.*". A
    model that is itself an nn.Linear comes back as an Int8Linear. Layers that share a weight share its int8 form; one
    whose weight something else uses too (an embedding) is left, and so is a subclass of nn.Linear or a layer with
    hooks. `model.quantization_report` says what was done; printed, it is a table.

    The quantised model is saved by its state_dict (torch.save, or safetensors' save_model) and loaded into a model that
    went through quantize_model; a checkpoint of the model before loads into it as well.

    Raises TypeError for what is no module, for names that are no strings and for weights that are not float32, bfloat16
    or float16; ValueError for other bits, for a name in skip that fits no layer, and for weights on the meta device.
    Source of the scheme: Jacob et al. 2018, section 2 (see llmkern.functional.int8_linear).
    """
    return replace_linears(model, Int8Linear, named(scheme), bits, skip)
