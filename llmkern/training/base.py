"""What the pretraining models share: embeddings, the loss, what is counted, the checks of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from llmkern import check, functional
from llmkern.training.configuration import PretrainingConfig
from llmkern.training.layers import Sequences
from llmkern.training.objectives.collate import IGNORED


class ModelOutput(NamedTuple):
    """What a model returns: loss (), None without labels; its terms by name, each a mean over what it counts; logits
    (B, S, vocab_size), None with labels."""

    loss: Tensor | None
    losses: dict[str, Tensor]
    logits: Tensor | None


def wide(x: Tensor) -> Tensor:
    """In 32 bits at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class PretrainingModel(nn.Module):
    """What the models share: embeddings whose matrix gives the logits too, the loss, the counts.

    config: its objective decides between EncoderModel, DecoderModel and EncoderDecoderModel; `build_model` chooses.
    The parameters are a function of config.seed, the same for fused models and plain ones.
    """

    term = "token"

    def __init__(self, config: PretrainingConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def _finish(self) -> None:
        """Parameters as BERT and GPT-2 have them at the beginning: N(0, 0.02^2), biases 0, norms 1."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            for module in self.modules():
                if isinstance(module, (nn.Linear, nn.Embedding)):
                    nn.init.normal_(module.weight, std=0.02)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _check(self, tokens: Tensor, shape: str = "(B, S)", **others: Tensor | None) -> None:
        """Each of the others that is there has the shape of the tokens: laid end to end, it would not show."""
        for name, t in others.items():
            if t is not None:
                check.is_tensor(name, t)
                check.shape(name, t, shape, tuple(tokens.shape))

    def _sequences(self, tokens: Tensor, mask: Tensor | None, documents: Tensor | None = None) -> Sequences:
        check.dtype("input_ids", tokens, (torch.int64,))
        check.rank("input_ids", tokens, "(B, S)")
        if tokens.size(1) > self.config.max_position_embeddings:
            expected = f"at most max_position_embeddings = {self.config.max_position_embeddings} tokens a row"
            raise ValueError(f"input_ids: expected {expected}, got {tokens.size(1)}")
        self._check(tokens, attention_mask=mask, document_ids=documents)
        here = Sequences.of(tokens, mask, documents, self.config.fused)
        # What it learns on is the run's to say; what it is asked afterwards may be as long as it has positions.
        most = self.config.max_seq_length
        if self.training and tokens.size(1) > most and (longest := int(here.seen.sum(1).max())) > most:
            expected = f"at most max_seq_length = {most} tokens a row in training"
            raise ValueError(f"input_ids: expected {expected}, got {longest}")
        return here

    def _places(self, here: Sequences, position_ids: Tensor | None) -> Tensor:
        """(B, S) int64: the position of each token; position_ids (B, S), or (1, S) for every row alike."""
        if position_ids is None:
            return here.within_documents()
        check.is_tensor("position_ids", position_ids)
        if tuple(position_ids.shape) == (1, here.seen.size(1)):
            position_ids = position_ids.expand(here.seen.shape)
        self._check(here.seen, position_ids=position_ids)
        return position_ids

    def _run(self, block: Callable[..., Tensor], *args: Any) -> Tensor:
        """A block, its activations kept or made again in the backward."""
        if self.config.activation_checkpointing and self.training and torch.is_grad_enabled():
            made: Tensor = checkpoint(block, *args, use_reentrant=False)
            return made
        return block(*args)

    def targets(self, batch: Mapping[str, Any]) -> Tensor:
        """(B, S) int64: what each place is to predict, IGNORED where nothing counts."""
        labels: Tensor = batch["labels"]
        mask = batch.get("attention_mask")
        return labels if mask is None else labels.masked_fill(mask == 0, IGNORED)

    def counted(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """How much each term of the loss counts in a batch, by which batches are weighed against each other.

        All terms, 0 for one that the batch has no labels of: processes must agree on what they sum.
        """
        return {self.term: self._count(None if batch.get("labels") is None else self.targets(batch))}

    def _count(self, labels: Tensor | None) -> Tensor:
        none = torch.zeros((), dtype=torch.int64, device=self.tokens.weight.device)
        return none if labels is None else (labels != IGNORED).sum()

    def _transform(self, hidden: Tensor) -> Tensor:
        """What stands between the last layer and the output's matrix."""
        return hidden

    def output(self) -> tuple[Tensor, Tensor | None]:
        """The matrix (vocab_size, hidden_size) and the bias (vocab_size,) that make logits."""
        return self.tokens.weight, None

    def predicting(self, hidden: Tensor, here: Sequences, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The rows (N, hidden_size) that predict something, ready for the output's matrix, and what, (N,)."""
        wanted = here.take(targets).flatten()
        rows = (wanted != IGNORED).nonzero().squeeze(1)
        return self._transform(hidden.flatten(0, -2).index_select(0, rows)), wanted[rows]

    def _loss(self, hidden: Tensor, here: Sequences, targets: Tensor) -> Tensor:
        """The mean over what counts; 0 where nothing does, with gradients of 0 for everything."""
        (weight, bias), smoothing, z_loss = self.output(), self.config.label_smoothing, self.config.z_loss
        if self.config.fused:
            rows, wanted = self.predicting(hidden, here, targets)
            if not wanted.numel():
                return (rows.sum() + weight.sum() + (0.0 if bias is None else bias.sum())) * 0.0 + hidden.sum() * 0.0
            loss: Tensor = functional.linear_cross_entropy(
                rows, weight, wanted, bias, ignore_index=IGNORED, label_smoothing=smoothing, z_loss=z_loss
            )
            return loss
        logits = wide(F.linear(self._transform(hidden), weight, bias)).flatten(0, -2)
        wanted = targets.flatten()
        total = F.cross_entropy(logits, wanted, ignore_index=IGNORED, label_smoothing=smoothing, reduction="sum")
        if z_loss:
            total = total + z_loss * (logits.logsumexp(-1).square() * (wanted != IGNORED)).sum()
        return total / (wanted != IGNORED).sum().clamp(min=1)

    def _result(
        self, hidden: Tensor, here: Sequences, batch: Mapping[str, Tensor | None], more: dict[str, Tensor]
    ) -> ModelOutput:
        if batch["labels"] is None and not more:
            logits = F.linear(self._transform(here.spread(hidden)), *self.output())
            return ModelOutput(None, {}, logits)
        own = {} if batch["labels"] is None else {self.term: self._loss(hidden, here, self.targets(batch))}
        losses = own | more
        return ModelOutput(sum(losses.values(), torch.zeros((), device=hidden.device)), losses, None)
