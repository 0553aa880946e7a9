"""Encoder-only, decoder-only and encoder-decoder models to be pretrained, made from a PretrainingConfig."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmkern import check
from llmkern.training.base import ModelOutput, PretrainingModel, wide
from llmkern.training.configuration import PretrainingConfig
from llmkern.training.layers import PostNormBlock, PreNormBlock, Sequences, layer_norm, rms_norm
from llmkern.training.objectives.collate import IGNORED


class EncoderModel(PretrainingModel):
    """BERT: learned positions, post-norm layers, heads for masked tokens and, with "mlm_nsp", for the next sentence.

    Source: Devlin et al. 2018, "BERT".
    """

    term = "mlm"

    def __init__(self, config: PretrainingConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.positions = nn.Embedding(config.max_position_embeddings, width)
        self.types = nn.Embedding(config.type_vocab_size, width)
        self.norm = layer_norm(config)
        self.layers = nn.ModuleList(PostNormBlock(config) for _ in range(config.num_hidden_layers))
        self.head, self.head_norm = nn.Linear(width, width), layer_norm(config)
        self.head_bias = nn.Parameter(torch.zeros(config.vocab_size))
        pairs = config.objective == "mlm_nsp"
        self.pooler = nn.Linear(width, width) if pairs else None
        self.next_sentence = nn.Linear(width, 2) if pairs else None
        self._finish()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None,
        labels: Tensor | None = None, next_sentence_label: Tensor | None = None, position_ids: Tensor | None = None,
    ) -> ModelOutput:  # fmt: skip
        """All (B, S) int64 but next_sentence_label, (B,), IGNORED where nothing counts. Either labels alone will do."""
        self._check(input_ids, labels=labels)
        hidden, here = self.hidden(input_ids, attention_mask, token_type_ids, position_ids)
        self._check(input_ids[:, 0], "(B,)", next_sentence_label=next_sentence_label)
        more = {}
        if self.next_sentence is not None and self.pooler is not None and next_sentence_label is not None:
            pooled = wide(self.next_sentence(self.dropout(torch.tanh(self.pooler(here.first(hidden))))))
            total = F.cross_entropy(pooled, next_sentence_label, ignore_index=IGNORED, reduction="sum")
            more["nsp"] = total / (next_sentence_label != IGNORED).sum().clamp(min=1)
        return self._result(hidden, here, {"labels": labels, "attention_mask": attention_mask}, more)

    def hidden(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, Sequences]:  # fmt: skip
        """The last layer's output, and where its rows stand in the batch; arguments as those of `forward`."""
        here = self._sequences(input_ids, attention_mask)
        tokens, places = here.take(input_ids), here.take(self._places(here, position_ids))
        self._check(input_ids, token_type_ids=token_type_ids)
        types = torch.zeros_like(tokens) if token_type_ids is None else here.take(token_type_ids)
        x = self.dropout(self.norm(self.tokens(tokens) + self.positions(places) + self.types(types)))
        for block in self.layers:
            x = self._run(block, x, here)
        return x, here

    def _transform(self, hidden: Tensor) -> Tensor:
        made: Tensor = self.head_norm(F.gelu(self.head(hidden)))
        return made

    def output(self) -> tuple[Tensor, Tensor | None]:
        return self.tokens.weight, self.head_bias

    def counted(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        found = super().counted(batch)
        if self.next_sentence is not None:
            found["nsp"] = self._count(batch.get("next_sentence_label"))
        return found


class DecoderModel(PretrainingModel):
    """LLaMA: rotary positions, RMSNorm before, gated feed-forward, no biases; the output's matrix is the embeddings'.

    Documents packed into a row are kept apart by document_ids: attention, positions and predictions stay within one.
    Source: Touvron et al. 2023, "LLaMA", section 2.2.
    """

    term = "clm"

    def __init__(self, config: PretrainingConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(PreNormBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = rms_norm(config)
        self._finish()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None,
        document_ids: Tensor | None = None, position_ids: Tensor | None = None,
    ) -> ModelOutput:  # fmt: skip
        """All (B, S) int64. labels are input_ids, IGNORED where nothing counts: the model moves them by one.
        document_ids: equal for neighbouring tokens of a document, -1 at padding; a number that comes back is another
        document."""
        self._check(input_ids, labels=labels)
        hidden, here = self.hidden(input_ids, attention_mask, document_ids, position_ids)
        batch = {"labels": labels, "attention_mask": attention_mask, "document_ids": document_ids}
        return self._result(hidden, here, batch, {})

    def hidden(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, document_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, Sequences]:  # fmt: skip
        """The last layer's output, and where its rows stand in the batch; arguments as those of `forward`."""
        here = self._sequences(input_ids, attention_mask, document_ids)
        places = here.take(self._places(here, position_ids))
        x = self.dropout(self.tokens(here.take(input_ids)))
        for block in self.layers:
            x = self._run(block, x, here, places)
        return self.norm(x), here

    def targets(self, batch: Mapping[str, Any]) -> Tensor:
        labels = F.pad(super().targets(batch)[:, 1:], (0, 1), value=IGNORED)
        documents = batch.get("document_ids")
        if documents is not None:
            labels = labels.masked_fill(documents != F.pad(documents[:, 1:], (0, 1), value=-1), IGNORED)
            labels = labels.masked_fill(documents < 0, IGNORED)
        mask = batch.get("attention_mask")
        return labels if mask is None else labels.masked_fill(mask == 0, IGNORED)


class EncoderDecoderModel(PretrainingModel):
    """The Transformer of Vaswani et al. 2017, section 3, with learned positions and GELU."""

    term = "seq2seq"

    def __init__(self, config: PretrainingConfig) -> None:
        super().__init__(config)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        depth = range(config.num_hidden_layers)
        self.encoder_norm, self.decoder_norm = layer_norm(config), layer_norm(config)
        self.encoder_layers = nn.ModuleList(PostNormBlock(config) for _ in depth)
        self.decoder_layers = nn.ModuleList(PostNormBlock(config, causal=True, cross=True) for _ in depth)
        self._finish()

    @property
    def layers(self) -> list[nn.Module]:
        """Those of both stacks."""
        return [*self.encoder_layers, *self.decoder_layers]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None,
        decoder_input_ids: Tensor | None = None, decoder_attention_mask: Tensor | None = None,
    ) -> ModelOutput:  # fmt: skip
        """input_ids and its mask (B, S), the others (B, T), int64. decoder_input_ids: by default the labels moved by
        one behind pad_token_id.

        Raises ValueError where there are neither labels nor decoder_input_ids.
        """
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("decoder_input_ids: expected (B, T) where there are no labels, got None")
            check.is_tensor("labels", labels)
            check.rank("labels", labels, "(B, T)")
            pad = self.config.pad_token_id
            decoder_input_ids = F.pad(labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, pad), (1, 0), value=pad)
        there = self._sequences(input_ids, attention_mask)
        self._check(decoder_input_ids, "(B, T)", labels=labels, decoder_attention_mask=decoder_attention_mask)
        if decoder_input_ids.size(0) != input_ids.size(0):
            expected = f"the {input_ids.size(0)} rows of input_ids"
            raise ValueError(f"decoder_input_ids: expected {expected}, got shape {tuple(decoder_input_ids.shape)}")
        memory = self._embedded(input_ids, there, self.encoder_norm)
        for block in self.encoder_layers:
            memory = self._run(block, memory, there)
        here = self._sequences(decoder_input_ids, decoder_attention_mask)
        x = self._embedded(decoder_input_ids, here, self.decoder_norm)
        for block in self.decoder_layers:
            x = self._run(block, x, here, None, memory, there)
        return self._result(x, here, {"labels": labels, "decoder_attention_mask": decoder_attention_mask}, {})

    def _embedded(self, tokens: Tensor, where: Sequences, norm: nn.Module) -> Tensor:
        places = self.positions(where.take(where.within_documents()))
        return self.dropout(norm(self.tokens(where.take(tokens)) + places))

    def targets(self, batch: Mapping[str, Any]) -> Tensor:
        labels: Tensor = batch["labels"]
        mask = batch.get("decoder_attention_mask")
        return labels if mask is None else labels.masked_fill(mask == 0, IGNORED)


_MODELS = {"encoder": EncoderModel, "decoder": DecoderModel, "encoder_decoder": EncoderDecoderModel}


def build_model(config: PretrainingConfig) -> PretrainingModel:
    """The model that config.objective needs, its parameters a function of config.seed."""
    if not isinstance(config, PretrainingConfig):
        raise TypeError(f"config: expected a PretrainingConfig, got {type(config).__name__}")
    model: PretrainingModel = _MODELS[config.architecture](config)
    return model
