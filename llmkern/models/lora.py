"""LoRA adapters of the peft library on an int8 base (extra: peft).

from peft import LoraConfig, PeftModel, get_peft_model
from llmkern.models.lora import for_int8

llmkern.quantize_model(model, skip=("lm_head",))
model = get_peft_model(model, for_int8(LoraConfig(r=8, target_modules=["q_proj", "v_proj"])))
...  # train, then model.save_pretrained(folder)
model = PeftModel.from_pretrained(base, folder, config=for_int8(LoraConfig.from_pretrained(folder)))
model = model.merge_and_unload()  # int8 still, the adapters within
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from llmkern.int8 import reference

try:
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear
    from peft.tuners.tuners_utils import check_adapters_to_merge
except ImportError as error:
    raise ImportError('llmkern.models.lora: expected peft (pip install "llmkern[peft]")') from error


def for_int8(config: LoraConfig) -> LoraConfig:
    """The same LoraConfig, which now knows int8 layers; peft does not save this with it, so say it again on loading.

    Name the layers in target_modules: peft's "all-linear" means torch's own nn.Linear.

    Raises TypeError for another object. Source: peft's guide "Custom models", whose mechanism this is.
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(f"config: expected a peft.LoraConfig, got {type(config).__name__}")
    config._register_custom_module({reference.Int8Linear: LoraInt8Linear})
    return config


class LoraInt8Linear(Linear):
    """peft's LoRA layer around an Int8Linear.

    The base is frozen, its gradient that of the dequantised weight. Merging dequantises the base, adds the adapters and
    quantises once, under the base's scheme, so that what an adapter changes by less than half a step may be lost; the
    integers before are kept until the layer is unloaded, and unmerging gives them back exactly. Raises ValueError for
    the variants of LoRA that read the weight (DoRA and others) and where an adapter to merge is not finite. Source: Hu
    et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
    """

    _before_merge: tuple[Tensor, Tensor, Tensor | None] | None = None

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        return {(): None}

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features  # which peft finds too, with a warning

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """adapter_names: by default all active ones. safe_merge: nothing here; what is not finite is never merged."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        base: Any = self.get_base_layer()
        bias = None if base.bias is None else base.bias.detach().clone()
        before = self._before_merge or (base.weight, base.weight_scale, bias)
        values, scale, bias = before
        weight = base.rotated(reference.dequantize_weight(values, scale, base.scheme.group))  # turned back, if it was
        for name in [*self.merged_adapters, *names]:
            weight = weight + self.get_delta_weight(name).to(weight)
            if self.lora_bias[name]:
                if bias is None:
                    raise ValueError("lora_bias: expected False where the base layer has no bias, got True")
                bias = bias + self.lora_B[name].bias * self.scaling[name]
        if not weight.isfinite().all():
            raise ValueError(f"adapter_names: expected adapters of finite numbers, got {', '.join(names)}")
        values, scale = base.quantize(weight, base.scheme)
        self._set(values, scale, bias)
        self._before_merge = before
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Gives the base back the integers that it had."""
        if self._before_merge is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._set(*self._before_merge)
        self._before_merge = None
        self.merged_adapters.clear()

    def _set(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        """New tensors and not new values: the old ones may be another layer's too."""
        base: Any = self.get_base_layer()
        base.weight, base.weight_scale = weight, scale
        if bias is not None:
            base.bias.data = bias.to(base.bias.dtype)
