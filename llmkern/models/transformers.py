"""llmkern's attention inside Hugging Face transformers 5: one call, then attn_implementation="llmkern".

from llmkern.models.transformers import register
register()
model = AutoModel.from_pretrained(path, attn_implementation="llmkern")
model.set_attn_implementation("llmkern")  # or one that is loaded already

An encoder may also leave the padding out of all its layers:

packed = without_padding(input_ids, attention_mask)
hidden = with_padding(model(**packed).last_hidden_state, attention_mask)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llmkern.attention.op import attention_varlen
from llmkern.attention.sdpa import scaled_dot_product_attention

#: Arguments of some models that are not known here.
_UNKNOWN = ("cache",)


def register(name: str = "llmkern") -> None:
    """Makes attn_implementation=`name` known to transformers, in this process; repeating it does no harm.

    Registers the attention and, under the same name, what makes its mask: without the latter transformers builds no
    mask at all, and silently so. Registers int8 as a quantiser too (llmkern.models.int8_config).

    Raises ImportError without transformers 5 or newer.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface

        import llmkern.models.int8_config  # noqa: F401
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
    sees all keys. position_bias (T5): added to the scaled scores. softcap (Gemma 2): caps the scaled scores. s_aux
    (gpt-oss) (H,): attention sinks. A sliding window comes inside the mask. Returns (B, Sq, H, Dv) and, in place of the
    weights, None.

    Sentences laid end to end, B = 1 (transformers' FlashAttentionKwargs): cu_seq_lens_q, cu_seq_lens_k (N + 1,) are
    their bounds, max_length_q, max_length_k the longest; each attends to itself alone, and sliding_window says to how
    much of itself. With a mask, the mask alone rules, as in sdpa.

    Raises ValueError where a model asks for a paged cache, and as llmkern.functional.scaled_dot_product_attention and
    attention_varlen do. Source: transformers' integrations/sdpa_attention.py, whose
    conventions these are.
    """
    for name in _UNKNOWN:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{name}: expected None, which is all that attn_implementation='llmkern' knows, got a value"
            )
    if kwargs.get("cu_seq_lens_q") is not None and attention_mask is None and position_bias is None:
        return _end_to_end(module, query, key, value, dropout, scaling, is_causal, kwargs), None
    if query.dtype == torch.float64:  # which no kernel has
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout,
            scaling,
            is_causal,
            position_bias=position_bias,
            **kwargs,
        )
    queries, keys = query.shape[2], key.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = bool(is_causal) and attention_mask is None and queries > 1
    if position_bias is not None:
        attention_mask, causal = _with_bias(position_bias, attention_mask, causal, queries, keys), False
    output = scaled_dot_product_attention(
        query, key, value, attention_mask, dropout, causal, scaling, query.shape[1] != key.shape[1],
        softcap=kwargs.get("softcap") or 0.0, learnable_sink=kwargs.get("s_aux"),
    )  # fmt: skip
    # The output has the memory order of the query, (B, Sq, H, D) in most models: then nothing is copied here.
    return output.transpose(1, 2).contiguous(), None


def _end_to_end(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None,
    is_causal: bool | None, kwargs: dict[str, Any],
) -> Tensor:  # fmt: skip
    """Attention within each of the sentences laid end to end."""
    bounds, others = kwargs["cu_seq_lens_q"], kwargs.get("cu_seq_lens_k")
    if query.shape[0] != 1:
        raise ValueError(f"query: expected (1, H, T, D) with cu_seq_lens_q, got shape {tuple(query.shape)}")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    near = kwargs.get("sliding_window")
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    return attention_varlen(
        q,
        k,
        v,
        bounds,
        bounds if others is None else others,
        max_seqlen_q=kwargs.get("max_length_q"),
        max_seqlen_k=kwargs.get("max_length_k"),
        is_causal=causal,
        window_size=(-1, -1) if near is None else (near - 1, near - 1),
        softcap=kwargs.get("softcap") or 0.0,
        learnable_sink=kwargs.get("s_aux"),
        scale=scaling,
        dropout_p=dropout,
    )[None]


def without_padding(input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
    """The arguments of a transformers encoder with attn_implementation="llmkern", its sentences laid end to end.

    input_ids and attention_mask (B, S), tokens where the mask is not 0, at least one in each row. Every layer then
    works on the tokens alone. Positions count from the first token of each sentence. Raises ValueError for other shapes
    or a row without tokens. `with_padding` brings the hidden states back into the form (B, S, W).
    """
    if input_ids.dim() != 2 or attention_mask.shape != input_ids.shape:
        expected = f"(B, S), the shape of input_ids, {tuple(input_ids.shape)}"
        raise ValueError(f"attention_mask: expected {expected}, got shape {tuple(attention_mask.shape)}")
    mask = attention_mask != 0
    lengths = mask.sum(1)
    if bool((lengths == 0).any()):
        raise ValueError("attention_mask: expected at least one token in each row, got a row of padding alone")
    bounds = nn.functional.pad(lengths.cumsum(0), (1, 0))
    longest = int(lengths.max())
    return {
        "input_ids": input_ids[mask][None],
        "position_ids": (mask.cumsum(1) - 1)[mask][None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def with_padding(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, S, W) from hidden (1, T, W), the T tokens where attention_mask (B, S) is not 0; zeros elsewhere."""
    tokens, mask = hidden[0], attention_mask != 0
    return tokens.new_zeros(*mask.shape, tokens.shape[-1]).masked_scatter(mask[..., None], tokens)


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
