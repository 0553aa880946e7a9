"""The layers of the pretraining models, on llmkern's kernels or in plain PyTorch: the same parameters either way.

On the kernels the tokens of a batch lie end to end without their padding, (T, hidden_size), and attention runs within
each sequence or document of them; in plain PyTorch they are (B, S, hidden_size) under masks, as usual.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import llmkern
from llmkern import functional, reference
from llmkern.training.configuration import PretrainingConfig
from llmkern.transformer.layers import added


@dataclass(frozen=True)
class Sequences:
    """Where the tokens of a batch (B, S) are, made once for all layers.

    seen (B, S): which are tokens, not padding. documents (B, S) int64: 0, 1, 2, ... for the documents of a row, within
    which attention stays; None is one document a row. rows (T,) int64: the places of the tokens in the flattened batch,
    where they lie end to end; None for a plain batch. bounds (N + 1,) int32 and longest: where each document begins in
    them.
    """

    seen: Tensor
    documents: Tensor | None
    rows: Tensor | None = None
    bounds: Tensor | None = None
    longest: int = 0

    @classmethod
    def of(cls, tokens: Tensor, mask: Tensor | None, documents: Tensor | None, fused: bool) -> Sequences:
        """tokens (B, S) int64; mask (B, S), 0 at padding; documents (B, S), equal for neighbours of one document, -1 at
        padding. Raises ValueError where all is padding."""
        seen = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask != 0
        if documents is not None:
            seen = seen & (documents >= 0)
            # Numbered by what follows what: a number that comes back is another document.
            documents = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0)).cumsum(1)
        rows = seen.flatten().nonzero().squeeze(1)
        if not rows.numel():
            raise ValueError("attention_mask: expected a batch with at least one token, got padding alone")
        if not fused:
            return cls(seen, documents)
        if documents is None:  # a bound for every row, an empty one too
            ends = seen.sum(1).cumsum(0)
        else:
            document = torch.stack([torch.div(rows, tokens.size(1), rounding_mode="floor"), documents.flatten()[rows]])
            changes = (document[:, 1:] != document[:, :-1]).any(0).nonzero().squeeze(1) + 1
            ends = torch.cat([changes, rows.new_tensor([rows.numel()])])
        bounds = torch.cat([ends.new_zeros(1), ends]).int()
        longest = int(bounds.diff().max())
        return cls(seen, documents, rows, bounds, longest)

    def take(self, x: Tensor) -> Tensor:
        """Of values (B, S, ...) those of the tokens, (T, ...); of a plain batch all of them."""
        if self.rows is None or x.size(0) * x.size(1) == self.rows.numel():
            return x if self.rows is None else x.flatten(0, 1)
        return x.flatten(0, 1).index_select(0, self.rows)

    def spread(self, x: Tensor) -> Tensor:
        """The contrary of `take`, 0 at padding."""
        if self.rows is None:
            return x
        whole = x.new_zeros(self.seen.numel(), *x.shape[1:]).index_copy(0, self.rows, x)
        return whole.unflatten(0, self.seen.shape)

    def first(self, x: Tensor) -> Tensor:
        """The first token of every row, (B, W), of the values of tokens, 0 for a row of padding alone; for batches
        without documents."""
        if self.bounds is not None:
            found = x.index_select(0, self.bounds[:-1].clamp(max=x.size(0) - 1))
        else:
            found = x[torch.arange(x.size(0), device=x.device), self.seen.int().argmax(1)]
        return found.masked_fill(~self.seen.any(1, keepdim=True), 0.0)

    def within_documents(self) -> Tensor:
        """(B, S) int64: each token's place in its document, or in its row where there are none."""
        place = torch.arange(self.seen.size(1), device=self.seen.device).expand(self.seen.shape)
        if self.documents is None:
            return place
        begins = torch.ones_like(self.seen)
        begins[:, 1:] = self.documents[:, 1:] != self.documents[:, :-1]
        return place - torch.where(begins, place, 0).cummax(1).values


def attend(
    q: Tensor, k: Tensor, v: Tensor, queries: Sequences, keys: Sequences, causal: bool, dropout: float
) -> Tensor:
    """Attention of (..., H, D) tokens within sequences and documents; (..., H, D)."""
    if queries.bounds is not None and keys.bounds is not None:
        return functional.attention_varlen(
            q, k, v, queries.bounds, keys.bounds, max_seqlen_q=queries.longest, max_seqlen_k=keys.longest,
            is_causal=causal, dropout_p=dropout,
        )  # fmt: skip
    mask = None if bool(keys.seen.all()) else keys.seen[:, None, None, :]
    if keys.documents is not None and queries is keys:
        mask = (keys.documents[:, None, :, None] == keys.documents[:, None, None, :]) & keys.seen[:, None, None, :]
    if mask is not None and causal:
        mask, causal = mask & torch.ones(q.size(1), k.size(1), dtype=torch.bool, device=q.device).tril(), False
    blind = None
    if mask is not None:  # what sees nothing would be NaN; it gets 0, as from the kernels
        blind = ~mask.any(-1, keepdim=True)
        mask = mask | blind
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    made = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
    return (made if blind is None else made.masked_fill(blind, 0.0)).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head attention of w_q, w_k, w_v and w_o. rotary: positions turn queries and keys.

    Heads are counted from the projections' outputs, so that processes that share them each see their own.
    """

    def __init__(self, config: PretrainingConfig, causal: bool, rotary: bool) -> None:
        super().__init__()
        width, bias = config.hidden_size, not rotary
        self.head, self.causal, self.dropout = width // config.num_attention_heads, causal, config.dropout
        self.w_q, self.w_k, self.w_v, self.w_o = (nn.Linear(width, width, bias=bias) for _ in range(4))
        kind = llmkern.RotaryEmbedding if config.fused else reference.RotaryEmbedding
        self.rotary = kind(self.head, config.max_position_embeddings) if rotary else None

    def forward(
        self, x: Tensor, here: Sequences, positions: Tensor | None = None, memory: Tensor | None = None,
        there: Sequences | None = None,
    ) -> Tensor:  # fmt: skip
        """x (..., W) of `here`; memory (..., W) of `there`, where keys and values are another's. Returns x's shape."""
        other = x if memory is None else memory
        q, k, v = (
            w(t).unflatten(-1, (-1, self.head)) for w, t in ((self.w_q, x), (self.w_k, other), (self.w_v, other))
        )
        if self.rotary is not None:
            batched = [t if t.dim() == 4 else t[None] for t in (q, k)]
            turned = self.rotary(batched[0].transpose(1, 2), batched[1].transpose(1, 2), positions)
            q, k = (t.transpose(1, 2) if q.dim() == 4 else t[0].transpose(0, 1) for t in turned)
        dropout = self.dropout if self.training else 0.0
        return self.w_o(attend(q, k, v, here, there or here, self.causal, dropout).flatten(-2))


class FeedForward(nn.Module):
    """w_down(GELU(w_up(x))), or gated: w_down(SiLU(w_gate(x)) * w_up(x)) without biases (Shazeer 2020)."""

    def __init__(self, config: PretrainingConfig, gated: bool) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.fused = config.fused
        self.w_gate = nn.Linear(width, inner, bias=False) if gated else None
        self.w_up, self.w_down = nn.Linear(width, inner, bias=not gated), nn.Linear(inner, width, bias=not gated)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., W). Returns its shape."""
        up = self.w_up(x)
        if self.w_gate is None:
            return self.w_down(F.gelu(up))
        gate = self.w_gate(x)
        return self.w_down(functional.swiglu(gate, up) if self.fused else F.silu(gate) * up)


def layer_norm(config: PretrainingConfig) -> nn.LayerNorm:
    return (llmkern.LayerNorm if config.fused else nn.LayerNorm)(config.hidden_size, config.layer_norm_eps)


def rms_norm(config: PretrainingConfig) -> nn.RMSNorm:
    return (llmkern.RMSNorm if config.fused else nn.RMSNorm)(config.hidden_size, config.layer_norm_eps)


class PostNormBlock(nn.Module):
    """Attention, attention to a memory where `cross`, feed-forward: each added to what came, then normalised.

    Sources: Vaswani et al. 2017, section 3; Devlin et al. 2018, "BERT" (GELU).
    """

    def __init__(self, config: PretrainingConfig, causal: bool = False, cross: bool = False) -> None:
        super().__init__()
        self.attention, self.norm1 = Attention(config, causal, rotary=False), layer_norm(config)
        self.cross = Attention(config, causal=False, rotary=False) if cross else None
        self.norm_cross = layer_norm(config) if cross else None
        self.feed_forward, self.norm2 = FeedForward(config, gated=False), layer_norm(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, here: Sequences, positions: Tensor | None = None, memory: Tensor | None = None,
        there: Sequences | None = None,
    ) -> Tensor:  # fmt: skip
        """x (..., W), memory likewise. Returns x's shape."""
        # Under autocast what layers add comes in 16 bits, to a sum that stays in x's.
        x, _ = added(self.norm1, x, self.dropout(self.attention(x, here)).to(x.dtype))
        if self.cross is not None and self.norm_cross is not None:
            seen = self.cross(x, here, memory=memory, there=there)
            x, _ = added(self.norm_cross, x, self.dropout(seen).to(x.dtype))
        return added(self.norm2, x, self.dropout(self.feed_forward(x)).to(x.dtype))[0]


class PreNormBlock(nn.Module):
    """Causal attention with rotary positions and a gated feed-forward, each behind an RMSNorm.

    Source: Touvron et al. 2023, "LLaMA", section 2.2.
    """

    def __init__(self, config: PretrainingConfig) -> None:
        super().__init__()
        self.norm1, self.attention = rms_norm(config), Attention(config, causal=True, rotary=True)
        self.norm2, self.feed_forward = rms_norm(config), FeedForward(config, gated=True)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, here: Sequences, positions: Tensor) -> Tensor:
        """x (..., W), positions of its tokens. Returns x's shape."""
        change = self.dropout(self.attention(self.norm1(x), here, positions)).to(x.dtype)
        normal, x = added(self.norm2, x, change)
        return x + self.dropout(self.feed_forward(normal))
