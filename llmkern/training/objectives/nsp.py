"""Next sentence prediction: does the second segment follow the first in its document?"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmkern import check
from llmkern.training.objectives.collate import column, pad, padded_length
from llmkern.training.objectives.corpus import SENTENCE_START, WORD_START, Corpus
from llmkern.training.objectives.random import PAIRING, check_seed, generator
from llmkern.training.objectives.tokenizer import Template, padding_id

IS_NEXT, IS_RANDOM = 0, 1  #: as BERT and transformers have them


class SentencePairs:
    """Pairs of segments, each of whole sentences: half of the second ones follow the first, half come from elsewhere.

    corpus: with sentences marked, and at least two documents. length: of a pair at most, special tokens included.
    short: the share of pairs that are cut to a shorter length, drawn evenly, since models later meet those too.

    Every document is cut into runs of sentences that fill `length`, at least two in each; a run is one example. Its
    first segment is its first sentences, how many is drawn; its second segment is the others (label 0), or with one
    chance in two about as much from a random sentence of another document on (label 1). Longer pairs lose tokens from
    the longer segment, at its beginning or its end as is drawn. Documents of one sentence have no pair; they are taken
    for random segments, and counted in `single`. Held beside the corpus: 8 bytes a sentence, 16 a run.

    `draw(index, position)`: input_ids, token_type_ids (N,), special_tokens_mask (N,) bool, next_sentence_label, and
    where words are marked word_starts (N,) bool; what is drawn is a function of the seed and of the position.
    `pairs[i]` is `draw(i, i)`.

    Raises ValueError for a corpus without marks, with one document, or without a document of two sentences, for a
    length with no room for two tokens, and for a tokenizer that did not make the corpus.
    Source: Devlin et al. 2018, "BERT", section 3.1 and appendix A.2, create_pretraining_data.py; not as there, a
    single sentence at a document's end goes to the run before, and random segments are as long as true ones: neither
    gives the label away.
    """

    def __init__(self, corpus: Corpus, tokenizer: Any, length: int, *, seed: int = 0, short: float = 0.1) -> None:
        check.positive("length", length)
        check.probability("short", short)
        check_seed(seed)
        corpus.check(tokenizer)
        if not corpus.has_sentences:
            raise ValueError("corpus: expected one with sentences marked (Corpus.build: language), got one without")
        if len(corpus) < 2:
            raise ValueError(f"corpus: expected two documents or more, to pair sentences of both, got {len(corpus)}")
        self.corpus, self.template, self.seed, self.short = corpus, Template(tokenizer, 2), seed, short
        self.room = length - self.template.size
        if self.room < 2:
            raise ValueError(f"length: expected {self.template.size + 2} or more, got {length}")
        self.sentences = np.append(np.flatnonzero(corpus.marks & SENTENCE_START), len(corpus.tokens))
        #: the number of each document's first sentence, and behind the last one that of all
        self.first = np.searchsorted(self.sentences, np.append(0, corpus.ends))
        self.single = int(np.count_nonzero(np.diff(self.first) < 2))
        self.runs = np.array(array("q", chain.from_iterable(map(self._runs, range(len(corpus)))))).reshape(-1, 2)
        if not len(self.runs):
            raise ValueError("corpus: expected a document of two sentences or more, got none")

    def _runs(self, document: int) -> Iterator[int]:
        """Runs of sentences [from, to) that fill the room, two at least; what is left at the end joins the last."""
        start, end = int(self.first[document]), int(self.first[document + 1])
        while end - start >= 2:
            full = int(np.searchsorted(self.sentences, self.sentences[start] + self.room, side="right")) - 1
            stop = min(max(full, start + 2), end)
            stop = end if end - stop < 2 else stop
            yield from (start, stop)
            start = stop

    def __len__(self) -> int:
        return len(self.runs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.draw(index, index)

    def draw(self, index: int, position: int) -> dict[str, Any]:
        start, end = map(int, self.runs[index])
        draws = generator(self.seed, PAIRING, position)
        room = self.room
        if draws.random() < self.short:
            room = 2 + int(draws.random() * (room - 1))
        # The first segment: one sentence or more, and one or more left.
        split = start + 1 + int(draws.random() * (end - start - 1))
        first = (int(self.sentences[start]), int(self.sentences[split]))
        second = (int(self.sentences[split]), int(self.sentences[end]))
        is_random = draws.random() < 0.5
        if is_random:
            second = self._elsewhere(start, second[1] - second[0], draws)
        first, second = _shorten(first, second, room, draws)
        tokens, marks = self.corpus.tokens, self.corpus.marks
        example: dict[str, Any] = self.template.wrap(tokens[slice(*first)], tokens[slice(*second)])
        if self.corpus.has_words:
            starts = np.zeros(len(example["input_ids"]), bool)
            both = np.concatenate([marks[slice(*first)], marks[slice(*second)]])
            starts[~example["special_tokens_mask"]] = both & WORD_START != 0
            starts[np.flatnonzero(~example["special_tokens_mask"])[[0, first[1] - first[0]]]] = True
            example["word_starts"] = starts
        example["next_sentence_label"] = IS_RANDOM if is_random else IS_NEXT
        return example

    def _elsewhere(self, sentence: int, tokens: int, draws: np.random.Generator) -> tuple[int, int]:
        """Whole sentences, about `tokens`, of another document than that of `sentence`."""
        own = int(np.searchsorted(self.first, sentence, side="right")) - 1
        document = int(draws.random() * (len(self.corpus) - 1))
        document += document >= own
        begin, end = int(self.first[document]), int(self.first[document + 1])
        # Not so near the document's end that fewer would be left, where it has as many: a length that tells the label
        # is learnt instead of the text.
        last = int(np.searchsorted(self.sentences, self.sentences[end] - tokens, side="right")) - 1
        start = begin + int(draws.random() * (min(max(last, begin), end - 1) - begin + 1))
        wanted = int(self.sentences[start]) + tokens
        stop = min(max(int(np.searchsorted(self.sentences, wanted, side="right")) - 1, start + 1), end)
        if stop < end and self.sentences[stop + 1] - wanted < wanted - self.sentences[stop]:
            stop += 1
        return int(self.sentences[start]), int(self.sentences[stop])


def _shorten(
    first: tuple[int, int], second: tuple[int, int], room: int, draws: np.random.Generator
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Takes tokens off the longer segment, one by one from a drawn end, until both fit: in one step."""
    lengths = np.array([first[1] - first[0], second[1] - second[0]])
    over = int(lengths.sum()) - room
    if over <= 0:
        return first, second
    larger = int(lengths[1] > lengths[0])
    level = min(over, int(abs(lengths[0] - lengths[1])))
    off = [0, 0]
    off[larger] = level
    for k in (0, 1):
        off[k] += (over - level + (k == larger)) // 2
    made = []
    for segment, count in zip((first, second), off, strict=True):
        front = int(draws.binomial(count, 0.5))
        made.append((segment[0] + front, segment[1] - (count - front)))
    return made[0], made[1]


class NextSentenceCollator:
    """The pairs of `SentencePairs` as a batch; for pairs with hidden tokens, MaskedLanguageModelingCollator takes them.

    Returns int64 tensors input_ids, attention_mask, token_type_ids (batch, length) and next_sentence_label (batch,):
    0 where the second segment follows the first, 1 where it does not. Raises ValueError for examples that lack an
    entry, by name.
    """

    def __init__(self, tokenizer: Any, *, pad_to_multiple_of: int = 1) -> None:
        check.positive("pad_to_multiple_of", pad_to_multiple_of)
        self.padding, self.multiple = padding_id(tokenizer), pad_to_multiple_of

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        ids = column(examples, "input_ids")
        length = padded_length(ids, self.multiple)
        return {
            "input_ids": pad(ids, self.padding, length),
            "attention_mask": pad([np.ones(len(row)) for row in ids], 0, length),
            "token_type_ids": pad(column(examples, "token_type_ids"), 0, length),
            "next_sentence_label": torch.tensor([int(x) for x in column(examples, "next_sentence_label")]),
        }
