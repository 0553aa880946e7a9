"""Hugging Face models: their own switch of attentions, turned to llmkern and back, and their head."""

from __future__ import annotations

import inspect
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
    supported = getattr(module, "_supports_attention_backend", False) or getattr(module, "_supports_sdpa", False)
    if not supported or not module._can_set_attn_implementation() or not _asks_the_interface(type(module)):
        return None, "its attention cannot be exchanged: the model has no attention interface"

    def change() -> None:
        register()
        vars(module)[_BEFORE] = now
        module.set_attn_implementation(NAME)

    return change, ""


def _asks_the_interface(kind: type[Any]) -> bool:
    """Whether the file of a model's class takes its attention from transformers' interface, or has no attention of its
    own, as models have that are made of others. One that looks at the name of the implementation by itself knows
    transformers' own names alone."""
    file = sys.modules.get(kind.__module__)
    try:
        code = "" if file is None else inspect.getsource(file)
    except (OSError, TypeError):
        return False
    return "ALL_ATTENTION_FUNCTIONS" in code or "Attention" not in code


def register() -> None:
    """Makes llmkern's attention known to transformers in this process."""
    from llmkern.models import transformers

    transformers.register()


def without_caches(output: Any) -> Any:
    """A transformers model's output without the caches in it."""
    library: Any = sys.modules.get("transformers")
    if library is None or not isinstance(output, (dict, tuple)):
        return output
    caches = (library.Cache, library.EncoderDecoderCache)
    if isinstance(output, dict):
        return {name: value for name, value in output.items() if not isinstance(value, caches)}
    if type(output) is tuple:
        return tuple(value for value in output if not isinstance(value, caches))
    return output


def restore_attention(module: nn.Module) -> None:
    """Undoes what `attention_change` did to this module."""
    if _BEFORE in vars(module):
        model: Any = module
        model.set_attn_implementation(vars(module).pop(_BEFORE))


def head(model: Any) -> list[str]:
    """The names of the linear layer of a transformers model that makes the logits; empty where it has none."""
    made = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if module is made and isinstance(module, nn.Linear)]
