"""Hugging Face models: their own switch of attentions, turned to llmkern and back, and their head."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn

_BEFORE = "_llmkern_attention_before"
NAME = "llmkern"


def attention_change(module: Any) -> tuple[Callable[[], None] | None, str]:
    """What puts a transformers model on llmkern's attention; or None, and why (empty: it is no such model).

    A model inside another (the encoder of an encoder-decoder) is reached by the one around it.
    """
    transformers: Any = sys.modules.get("transformers")
    if transformers is None or not isinstance(module, transformers.PreTrainedModel):
        return None, ""
    now = getattr(module.config, "_attn_implementation", None)
    if now == NAME:
        return None, ""
    if not getattr(module, "_supports_attention_backend", False) and not getattr(module, "_supports_sdpa", False):
        return None, "its attention cannot be exchanged: the model has no attention interface"

    def change() -> None:
        from llmkern.models.transformers import register

        register()
        vars(module)[_BEFORE] = now
        module.set_attn_implementation(NAME)

    return change, ""


def restore_attention(module: nn.Module) -> None:
    """Undoes what `attention_change` did to this module."""
    if _BEFORE in vars(module):
        model: Any = module
        model.set_attn_implementation(vars(module).pop(_BEFORE))


def head(model: Any) -> list[str]:
    """The names of the linear layer of a transformers model that makes the logits; empty where it has none."""
    made = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if module is made and isinstance(module, nn.Linear)]
