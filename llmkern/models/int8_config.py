"""int8 as a quantiser of Hugging Face transformers 5: models are quantised while they load, saved, and loaded again.

from llmkern.models.int8_config import LlmkernInt8Config
model = AutoModelForCausalLM.from_pretrained(path, quantization_config=LlmkernInt8Config())
model.save_pretrained(folder)  # int8 on the disk
model = AutoModelForCausalLM.from_pretrained(folder)  # the same bits

The import makes the quantiser known to transformers, in this process, as `llmkern.models.transformers.register` does;
a process that loads what was saved needs one of the two.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from llmkern import check
from llmkern.int8.module import Int8Linear
from llmkern.int8.scheme import Int8Scheme, named
from llmkern.models.huggingface import head
from llmkern.models.quantize import quantize_model

try:
    from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise ImportError("llmkern.models.int8_config: expected transformers >= 5 (pip install transformers)") from error

METHOD = "llmkern_int8"


@register_quantization_config(METHOD)
class LlmkernInt8Config(QuantizationConfigMixin):
    """How `from_pretrained(..., quantization_config=LlmkernInt8Config())` quantises a model.

    scheme, skip, measure: as for `llmkern.quantize_model`, but without skip the layer that makes the logits is left.
    layers: of a model quantised already, the scheme of each int8 layer by its name, the numbers of `Int8Scheme.numbers`
    in a string; saved in the model's config.json and not for users to set.

    The weights are loaded in floating point first, a layer's int8 form is made behind them: for the time of loading
    the memory is that of the model before. A saved model is loaded as int8 at once; what it holds rules, whatever this
    machine would choose.

    Raises TypeError for names in skip that are no strings, for another measure and for options that are none of these;
    ValueError for an unknown scheme and for layers of other numbers. Schemes that need calibration data raise
    ValueError when a model is loaded: quantise it afterwards, see `of`.
    """

    def __init__(
        self,
        scheme: Int8Scheme | str | Mapping[str, Any] = "outliers",
        skip: Sequence[str] | None = None,
        measure: bool = True,
        layers: Mapping[str, str] | None = None,
        quant_method: str = METHOD,
    ) -> None:
        if quant_method != METHOD:
            raise ValueError(f"quant_method: expected {METHOD!r}, got {quant_method!r}")
        if isinstance(scheme, Mapping) and (unknown := set(scheme) - {f.name for f in dataclasses.fields(Int8Scheme)}):
            raise ValueError(f"scheme: expected fields of Int8Scheme, got {', '.join(sorted(unknown))}")
        made = Int8Scheme(**scheme) if isinstance(scheme, Mapping) else named(scheme)
        is_list = isinstance(skip, Sequence) and not isinstance(skip, str)
        if skip is not None and not (is_list and all(isinstance(name, str) for name in skip)):
            raise TypeError(f"skip: expected None or a sequence of names, got {skip!r}")
        check.flag("measure", measure)
        if layers is not None and not isinstance(layers, Mapping):
            raise TypeError(f"layers: expected None or a mapping of names to schemes, got {type(layers).__name__}")
        for numbers in (layers or {}).values():
            _saved(numbers)
        self.quant_method: Any = quant_method
        self.scheme = dataclasses.asdict(made)
        self.skip = None if skip is None else list(skip)
        self.measure = measure
        self.layers = None if layers is None else dict(layers)

    @classmethod
    def of(cls, model: nn.Module) -> LlmkernInt8Config:
        """The configuration of a model that `llmkern.quantize_model` changed, with calibration data for one.

        model.config.quantization_config = LlmkernInt8Config.of(model), and `model.save_pretrained` saves it so that
        `from_pretrained` loads it. Raises ValueError for a model without int8 layers.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        layers = _layers(model)
        if not layers:
            raise ValueError("model: expected one with int8 layers, which llmkern.quantize_model makes, got none")
        return cls(layers=layers)


@register_quantizer(METHOD)
class LlmkernInt8Quantizer(HfQuantizer):
    """What transformers calls around the loading of a model's weights."""

    quantization_config: LlmkernInt8Config
    is_trainable = True  # gradients go through the layers, to their inputs and biases
    is_compileable = True

    def __init__(self, quantization_config: LlmkernInt8Config, **kwargs: Any) -> None:
        super().__init__(copy.deepcopy(quantization_config), **kwargs)  # the user's own serves further models

    def is_serializable(self) -> bool:
        return True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raises ValueError for what no model can be loaded with."""
        config = self.quantization_config
        if self.pre_quantized and config.layers is None:
            raise ValueError("layers: expected the int8 layers of the saved model in its config.json, got None")
        scheme = Int8Scheme(**config.scheme)
        if not self.pre_quantized and scheme.calibrated:
            raise ValueError(
                "scheme: expected one without calibration data while a model loads, "
                f"got {scheme}; load it, then llmkern.quantize_model(model, scheme=..., calibration=...)"
            )

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """A saved model's int8 layers, without values yet, in place of the linear ones."""
        if not self.pre_quantized:
            return
        outer = f"{model.base_model_prefix}."  # saved with a head and loaded without, or the other way round
        modules = dict(model.named_modules())
        for saved, numbers in (self.quantization_config.layers or {}).items():
            found = [n for n in (saved, outer + saved, saved.removeprefix(outer)) if n in modules]
            if not found:
                continue  # of a part that this class lacks; transformers tells of weights that nobody took
            linear = modules[found[0]]
            if type(linear) is not nn.Linear:
                raise ValueError(f"layers: expected names of linear layers, got {saved!r}, a {type(linear).__name__}")
            made = Int8Linear(
                linear.in_features, linear.out_features, linear.bias is not None, "meta", linear.weight.dtype,
                scheme=_saved(numbers),
            )  # fmt: skip
            parent, _, attribute = found[0].rpartition(".")
            setattr(model.get_submodule(parent), attribute, made)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self.quantization_config
        if self.pre_quantized:
            return model
        skip = config.skip
        if skip is None:
            skip = head(model)
        quantize_model(model, scheme=Int8Scheme(**config.scheme), skip=skip, measure=config.measure, progress=False)
        config.layers = _layers(model)
        return model


def _layers(model: nn.Module) -> dict[str, str]:
    found = {name: m.scheme.numbers() for name, m in model.named_modules() if isinstance(m, Int8Linear)}
    return {name: " ".join(map(str, numbers)) for name, numbers in found.items()}


def _saved(numbers: str) -> Int8Scheme:
    given = numbers.split() if isinstance(numbers, str) else []
    if not given or not all(n.isdigit() for n in given):
        raise ValueError(f"layers: expected the numbers of a scheme in a string, '0 0 0', got {numbers!r}")
    return Int8Scheme.from_numbers([int(n) for n in given])
