"""A tiny model, its data and its runs, shared by the tests of this folder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern.training import PretrainingConfig

LENGTH = 12
VOCABULARY = 40


def config(**changes: Any) -> PretrainingConfig:
    """Two layers of 32; without dropout, which no two numbers of processes draw alike."""
    fields: dict[str, Any] = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=16,
        max_seq_length=LENGTH, vocab_size=VOCABULARY, dropout=0.0, warmup_steps=2, max_steps=8, learning_rate=1e-2,
        batch_size=4, num_epochs=100, checkpoint_every=2, progress=False,
    )  # fmt: skip
    return PretrainingConfig(**(fields | changes))


class Sentences:
    """Random tokens, padded to one length, about a third of them to be found; as `objective` needs them."""

    def __init__(self, objective: str = "mlm", examples: int = 40) -> None:
        self.objective, self.examples = objective, examples

    def __len__(self) -> int:
        return self.examples

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(VOCABULARY, (LENGTH,), generator=generator)
        used = int(torch.randint(3, LENGTH + 1, (), generator=generator))
        seen = torch.arange(LENGTH) < used
        found = (torch.rand(LENGTH, generator=generator) < 0.3) | (torch.arange(LENGTH) == 1)
        one = {"input_ids": tokens, "attention_mask": seen.long()}
        if self.objective == "clm":
            documents = (torch.arange(LENGTH) >= used // 2).long().masked_fill(~seen, -1)
            labels = tokens.masked_fill(~seen, -100)
            return {"input_ids": tokens, "labels": labels, "document_ids": documents}
        if self.objective == "mlm_nsp":
            one |= {
                "token_type_ids": (torch.arange(LENGTH) >= used // 2).long(),
                "next_sentence_label": torch.tensor(number % 2 if number % 3 else -100),
            }
        return one | {"labels": tokens.masked_fill(~(found & seen), -100)}


def batch(objective: str = "mlm", rows: range = range(4)) -> dict[str, Tensor]:
    """Some examples in one batch."""
    return collate([Sentences(objective)[i] for i in rows])


def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {name: torch.stack([e[name] for e in examples]) for name in examples[0] if name != "position"}
