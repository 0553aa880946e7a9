"""Masked language modelling: some tokens are hidden, and the model finds them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmkern import check
from llmkern.training.objectives.collate import IGNORED, column, pad, padded_length
from llmkern.training.objectives.corpus import WORD_START, Corpus
from llmkern.training.objectives.random import MASKING, check_seed, generator
from llmkern.training.objectives.tokenizer import Template, needed_id, ordinary_ids, padding_id, special_ids


class TextBlocks:
    """The documents of a corpus in blocks, each within one document, between the tokenizer's special tokens.

    length: tokens of a block, special ones included; the last block of a document is shorter. Where words are marked a
    block ends between two, if it does not consist of one alone. Held beside the corpus: 16 bytes a block.

    An example has input_ids (N,), special_tokens_mask (N,) bool, and where words are marked word_starts (N,) bool.

    Raises ValueError for a length that has no room for text and for a tokenizer that did not make the corpus.
    Source of the arrangement: Liu et al. 2019, "RoBERTa", section 4.2 (DOC-SENTENCES, whole documents in pieces).
    """

    def __init__(self, corpus: Corpus, tokenizer: Any, length: int) -> None:
        check.positive("length", length)
        corpus.check(tokenizer)
        self.corpus, self.template = corpus, Template(tokenizer, 1)
        room = length - self.template.size
        if room < 1:
            raise ValueError(f"length: expected more than the {self.template.size} special tokens, got {length}")
        blocks = array("q")  # a list of pairs would take ten times as much
        for document in range(len(corpus)):
            start, end = corpus.span(document)
            while start < end:
                stop = min(start + room, end)
                if corpus.has_words and stop < end:
                    # The last word that begins in here or right behind is the next block's first.
                    begins = np.flatnonzero(corpus.marks[start + 1 : stop + 1] & WORD_START)
                    stop = start + 1 + int(begins[-1]) if len(begins) else stop
                blocks.extend((start, stop))
                start = stop
        self.blocks = np.array(blocks, np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, end = self.blocks[index]
        example = self.template.wrap(self.corpus.tokens[start:end])
        del example["token_type_ids"]  # one sequence is all of type 0, as models take it to be
        if self.corpus.has_words:
            starts = np.zeros(len(example["input_ids"]), bool)
            starts[~example["special_tokens_mask"]] = self.corpus.marks[start:end] & WORD_START != 0
            example["word_starts"] = starts
        return example


class MaskedLanguageModelingCollator:
    """Hides tokens: of those chosen 80 % become the mask, 10 % a random token, 10 % stay; each is a label.

    tokenizer: any of transformers with a mask token. probability: of a token to be chosen; whole_word: words are chosen
    with it instead, all tokens of each (what becomes of a token is drawn for it alone, as BERT does). mask, random: the
    shares of the first two kinds. pad_to_multiple_of: of the batch's length. Special tokens are never chosen, and none
    replaces another; where nothing was chosen in an example, one token or word of it is, so that the loss is never of
    none.

    Called with examples: input_ids (N,), "position" (Batches gives it), optionally special_tokens_mask,
    token_type_ids, word_starts (N,) (needed for whole_word) and next_sentence_label. Returns int64 tensors input_ids,
    attention_mask, labels (batch, length), the labels -100 where nothing is to be found; and token_type_ids
    (batch, length), next_sentence_label (batch,) where given. What is drawn for an example is a function of the seed
    and of its position.

    Raises TypeError, ValueError for wrong arguments and for examples that lack an entry, by name.
    Source: Devlin et al. 2018, "BERT", section 3.1; whole words: that of its repository, 31 May 2019.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        probability: float = 0.15,
        mask: float = 0.8,
        random: float = 0.1,
        whole_word: bool = False,
        seed: int = 0,
        pad_to_multiple_of: int = 1,
    ) -> None:
        for name, value in (("probability", probability), ("mask", mask), ("random", random)):
            check.probability(name, value)
        if mask + random > 1.0 + 1e-9:
            raise ValueError(f"random: expected at most 1 - mask = {1.0 - mask:.3g}, got {random}")
        check.flag("whole_word", whole_word)
        check.positive("pad_to_multiple_of", pad_to_multiple_of)
        check_seed(seed)
        self.mask_id, self.padding = needed_id(tokenizer, "mask"), padding_id(tokenizer)
        self.special, self.ordinary = special_ids(tokenizer), ordinary_ids(tokenizer)
        self.probability, self.mask, self.random, self.whole_word = probability, mask, random, whole_word
        self.seed, self.multiple = seed, pad_to_multiple_of

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        ids, positions = column(examples, "input_ids"), column(examples, "position")
        starts = column(examples, "word_starts") if self.whole_word else ids
        hidden, labels = [], []
        for example, row, word_starts, position in zip(examples, ids, starts, positions, strict=True):
            special = np.isin(row, self.special)
            if "special_tokens_mask" in example:
                special |= np.asarray(example["special_tokens_mask"], bool)
            # One draw decides for a word: its number, counted within the example.
            unit = np.cumsum(word_starts) if self.whole_word else np.arange(len(row))
            made, label = self._hide(row, special, unit, int(position))
            hidden.append(made)
            labels.append(label)
        length = padded_length(ids, self.multiple)
        batch = {
            "input_ids": pad(hidden, self.padding, length),
            "attention_mask": pad([np.ones(len(row)) for row in ids], 0, length),
            "labels": pad(labels, IGNORED, length),
        }
        if "token_type_ids" in examples[0]:
            batch["token_type_ids"] = pad(column(examples, "token_type_ids"), 0, length)
        if "next_sentence_label" in examples[0]:
            batch["next_sentence_label"] = torch.tensor([int(x) for x in column(examples, "next_sentence_label")])
        return batch

    def _hide(self, row: np.ndarray, special: np.ndarray, unit: np.ndarray, position: int) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip # noqa: E501
        draws = generator(self.seed, MASKING, position)
        per_unit = draws.random(int(unit.max(initial=0)) + 1)
        fate, other, spare = draws.random(len(row)), draws.random(len(row)), draws.random()
        chosen = (per_unit[unit] < self.probability) & ~special
        if not chosen.any() and not special.all() and self.probability:
            units = np.unique(unit[~special])
            chosen = (unit == units[int(spare * len(units))]) & ~special
        made = row.astype(np.int64)
        masked = chosen & (fate < self.mask)
        replaced = chosen & (fate >= self.mask) & (fate < self.mask + self.random)
        made[masked] = self.mask_id
        made[replaced] = self.ordinary[(other[replaced] * len(self.ordinary)).astype(np.int64)]
        return made, np.where(chosen, row, IGNORED)
