"""llmkern's attention inside Hugging Face transformers 5: one call, then attn_implementation="llmkern".

from llmkern.models.transformers import register
register()
model = AutoModel.from_pretrained(path, attn_implementation="llmkern")
model.set_attn_implementation("llmkern")  # or one that is loaded already
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llmkern.attention.sdpa import scaled_dot_product_attention

#: Arguments by which some models change the softmax itself, and which no kernel here knows.
_UNKNOWN = ("softcap", "s_aux", "cache")


def register(name: str = "llmkern") -> None:
    """Makes attn_implementation=`name` known to transformers, in this process; repeating it does no harm.

    Registers the attention and, under the same name, what makes its mask: without the latter transformers builds no
    mask at all, and silently so. Raises ImportError without transformers 5 or newer.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError(
            "llmkern.models.transformers: expected transformers >= 5 (pip install transformers)"
        ) from error
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, attention_mask_for)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers' AttentionInterface.

    query (B, H, Sq, D), key (B, Hkv, Sk, D), value (B, Hkv, Sk, Dv), Hkv a divisor of H: the kernels read the shared
    heads in place, nothing is repeated. attention_mask: None or broadcastable to (B, H, Sq, Sk), bool (True takes part)
    or added to the scores. Without a mask the model's own `is_causal` decides, unless there is one query only, which
    sees all keys. position_bias (T5): added to the scaled scores. A sliding window comes inside the mask. Returns
    (B, Sq, H, Dv) and, in place of the weights, None.

    Raises ValueError where a model asks for softcap, attention sinks (s_aux) or a paged cache, and as
    llmkern.functional.scaled_dot_product_attention does. Source: transformers' integrations/sdpa_attention.py, whose
    conventions these are.
    """
    for name in _UNKNOWN:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{name}: expected None, which is all that attn_implementation='llmkern' knows, got a value"
            )
    queries, keys = query.shape[2], key.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = bool(is_causal) and attention_mask is None and queries > 1
    if position_bias is not None:
        attention_mask, causal = _with_bias(position_bias, attention_mask, causal, queries, keys), False
    output = scaled_dot_product_attention(
        query, key, value, attention_mask, dropout, causal, scaling, query.shape[1] != key.shape[1]
    )
    # The output has the memory order of the query, (B, Sq, H, D) in most models: then nothing is copied here.
    return output.transpose(1, 2).contiguous(), None


def _with_bias(bias: Tensor, mask: Tensor | None, causal: bool, queries: int, keys: int) -> Tensor:
    if mask is not None and mask.dtype != torch.bool:
        return bias + mask
    if causal:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=bias.device).tril()
    return bias if mask is None else torch.where(mask, bias, torch.finfo(bias.dtype).min)


def attention_mask_for(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask function of transformers' AttentionMaskInterface: what `attention_forward` gets as its mask.

    An encoder's padding stays as small as it came: (B, 1, 1, Sk) bool, True takes part, so that kernels see which keys
    no query needs; None where nothing is padded. Everything else (causal, windows, packed sequences, caches) is
    (B, 1, Sq, Sk) bool, or None where `is_causal` says it all, exactly as transformers makes it for torch's attention.
    """
    from transformers import masking_utils

    if mask_function is None:
        mask_function = masking_utils.causal_mask_function
    arguments = dict(kwargs, attention_mask=attention_mask, mask_function=mask_function)
    padding_only = mask_function is masking_utils.bidirectional_mask_function and attention_mask is not None
    if not padding_only:
        return masking_utils.sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, **arguments)
    # One query's row of transformers' own mask stands for all: without another rule they are equal.
    return masking_utils.sdpa_mask(
        batch_size, 1, kv_length, 0, kv_offset, **dict(arguments, allow_is_causal_skip=False)
    )
