"""The likelihood of texts under a language model: which tokens count, and windows over long texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmkern import check

IGNORED = -100
#: Rows of logits that are widened at once.
ROWS = 128
#: What configurations call the most tokens of a row.
LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


class Window(NamedTuple):
    """A stretch of a text, of which the last `counted` tokens are predicted."""

    tokens: list[int]
    counted: int


def windows(tokens: Sequence[int], window: int, stride: int) -> Iterator[Window]:
    """Windows of at most `window` tokens that begin `stride` tokens apart; each predicts what none before it has seen.

    The first token of a text is context alone. Source: "Perplexity of fixed-length models", Hugging Face.
    """
    seen = 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + window, len(tokens))
        # A window's own first token has nothing before it, as at a stride of the whole window.
        counted = min(end - seen, end - begin - 1)
        if counted > 0:
            yield Window(list(tokens[begin:end]), counted)
        seen = end
        if end == len(tokens):
            return


def batch_of(part: Sequence[Window]) -> dict[str, Tensor]:
    """Windows in one batch, padded right: input_ids, attention_mask, labels, (B, S) int64."""
    longest = max(len(w.tokens) for w in part)
    ids, labels = torch.zeros(len(part), longest, dtype=torch.int64), torch.full((len(part), longest), IGNORED)
    mask = torch.zeros_like(ids)
    for row, one in enumerate(part):
        size = len(one.tokens)
        ids[row, :size], mask[row, :size] = torch.tensor(one.tokens), 1
        labels[row, size - one.counted : size] = ids[row, size - one.counted : size]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def limit_of(model: nn.Module, tokenizer: Any) -> int | None:
    """The most tokens that model and tokenizer say they take; None where neither does."""
    config = getattr(model, "config", None)
    told = [getattr(config, name, None) for name in LIMITS] + [getattr(tokenizer, "model_max_length", None)]
    return min((n for n in told if isinstance(n, int) and 1 < n < 10**9), default=None)


def kind_of(model: nn.Module) -> str:
    """ "decoder" or "encoder_decoder".

    Raises ValueError for an encoder: a token that it sees has no likelihood.
    """
    config = getattr(model, "config", None)
    own = getattr(config, "architecture", None)  # of llmkern.training
    if own == "encoder_decoder" or getattr(config, "is_encoder_decoder", False) is True:
        return "encoder_decoder"
    if own == "encoder" or _is_masked(model, config):
        raise ValueError(
            "model: expected a decoder or an encoder-decoder, got an encoder, "
            f"{type(model).__name__}: it sees the tokens it is asked for. evaluate_pseudo_perplexity hides them in turn"
        )
    return "decoder"


def _is_masked(model: nn.Module, config: Any) -> bool:
    """Whether it is a transformers model of a family of encoders that was not made a decoder."""
    if getattr(config, "model_type", None) is None or getattr(config, "is_decoder", False):
        return False
    try:
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as names
    except ImportError:
        return False
    return config.model_type in names or type(model).__name__ in names.values()


def prepared(batch: dict[str, Any], kind: str) -> tuple[dict[str, Any], Tensor]:
    """What the model is given, and the targets of its logits, (B, S) int64, IGNORED where nothing counts.

    A decoder's rows are moved so that no padding stands before or within them: positions then count from their first
    token, whatever the model makes of a mask.
    """
    if kind == "encoder_decoder":
        if not isinstance(batch.get("labels"), Tensor):
            raise ValueError("dataset: expected batches with labels for an encoder-decoder, got one without")
        labels = batch["labels"]
        mask = batch.get("decoder_attention_mask")
        return batch, labels if mask is None else labels.masked_fill(mask == 0, IGNORED)
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor):
        raise ValueError("dataset: expected batches with input_ids, got one without")
    check.rank("input_ids", ids, "(B, S)")
    given = dict(batch)
    mask = given.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        order = (mask == 0).to(torch.int8).argsort(dim=1, stable=True)
        longest = int((mask != 0).sum(1).max()) if mask.numel() else 0
        for name, value in given.items():
            if isinstance(value, Tensor) and value.shape == ids.shape:
                given[name] = value.gather(1, order)[:, :longest]
        ids, mask = given["input_ids"], given["attention_mask"]
    labels = given.pop("labels", None)
    if labels is None:
        labels = ids
    check.shape("labels", labels, "(B, S)", tuple(ids.shape))
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        labels = labels.masked_fill(mask == 0, IGNORED)
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    documents = given.get("document_ids")
    if isinstance(documents, Tensor):  # packed rows of llmkern.training, whose documents predict nothing of the next
        targets = targets.masked_fill(documents != F.pad(documents[:, 1:], (0, 1), value=-1), IGNORED)
    return given, targets


def moved(labels: Tensor, pad: int) -> Tensor:
    """A decoder's inputs of its labels (B, T): one place later, behind the padding token."""
    return F.pad(labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, pad), (1, 0), value=pad)


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> tuple[float, int]:
    """Summed over the targets that count, and their number. logits: (B, S, V); targets: (B, S).

    In float64: float32's sum over a large vocabulary shifts every token the same way. On MPS, which lacks it, float32.
    """
    if logits.dim() != 3 or logits.shape[:2] != targets.shape:
        expected = f"logits (B, S, V) with (B, S) = {tuple(targets.shape)}"
        raise ValueError(f"model: expected one that gives {expected}, got shape {tuple(logits.shape)}")
    here = (targets != IGNORED).nonzero(as_tuple=True)
    wanted = targets[here]
    summed = 0.0
    for at in range(0, len(wanted), ROWS):
        rows = logits[here[0][at : at + ROWS], here[1][at : at + ROWS]]
        rows = rows.to(torch.float32 if rows.device.type == "mps" else torch.float64)
        with torch.autocast(rows.device.type, enabled=False):
            losses = F.cross_entropy(rows, wanted[at : at + ROWS], reduction="none")
        summed += float(losses.sum())
    return summed, len(wanted)
