"""What the objectives have to know of a tokenizer, whichever of transformers it is."""

from __future__ import annotations

import hashlib
import re
from itertools import pairwise
from typing import Any

import numpy as np

SPACE = re.compile(r"\s+")
#: Letters that are words by themselves where words are not spaced, as BERT's tokenizer has it for ideographs: Han,
#: kana, and Bopomofo. Hangul is spaced.
IDEOGRAPH = re.compile("[\u2e80-\u2fdf\u3005-\u3007\u3041-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")  # fmt: skip # noqa: E501


def special_ids(tokenizer: Any) -> np.ndarray:
    """The sorted ids of all special tokens, also of those that were added."""
    added = [i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special]
    return np.unique(np.array([*tokenizer.all_special_ids, *added], np.int64))


def ordinary_ids(tokenizer: Any) -> np.ndarray:
    """The sorted ids of all other tokens. Raises ValueError where there are none."""
    ids = np.setdiff1d(np.array(sorted(tokenizer.get_vocab().values()), np.int64), special_ids(tokenizer))
    if not len(ids):
        raise ValueError("tokenizer: expected one with tokens that are not special, got none")
    return ids


def needed_id(tokenizer: Any, name: str) -> int:
    """The id of "mask", "pad", ... Raises ValueError where the tokenizer has no such token."""
    found = getattr(tokenizer, f"{name}_token_id", None)
    if found is None:
        raise ValueError(f"tokenizer: expected one with a {name}_token, got {type(tokenizer).__name__} without")
    return int(found)


def padding_id(tokenizer: Any) -> int:
    """The padding token's id; without one the end's, without that 0: attention and losses leave padding out."""
    found = [tokenizer.pad_token_id, tokenizer.eos_token_id, 0]
    return int(next(i for i in found if i is not None))


def fingerprint(tokenizer: Any) -> str:
    """Of the vocabulary: ids made by one tokenizer mean nothing to another."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: (entry[1], entry[0]))
    return hashlib.sha256(repr(vocabulary).encode("utf-8", "backslashreplace")).hexdigest()


class Template:
    """The special tokens that a tokenizer puts around one sequence, or around and between two.

    between: the ids before the first sequence, (between the two,) and after the last; types: the token_type_ids of each
    part in order (specials, sequence, specials, ...): 1 from a second sequence on where the tokenizer tells none apart;
    size: how many special tokens there are. Raises ValueError where a tokenizer adds what is not special.
    """

    def __init__(self, tokenizer: Any, sequences: int) -> None:
        plain = len(tokenizer("a", add_special_tokens=False)["input_ids"])
        made = tokenizer(*["a"] * sequences, return_token_type_ids=True, return_special_tokens_mask=True)
        ids, special = made["input_ids"], np.array(made["special_tokens_mask"], bool)
        if not plain or np.count_nonzero(~special) != plain * sequences:
            raise ValueError("tokenizer: expected one that knows 'a' and puts only special tokens around a text")
        own = np.flatnonzero(~special).reshape(sequences, plain)
        bounds = [0, *(int(at) for row in own for at in (row[0], row[-1] + 1)), len(ids)]
        parts = [slice(start, end) for start, end in pairwise(bounds)]
        types = made.get("token_type_ids") or [0] * len(ids)
        if not any(types):
            types = [int(at >= own[-1, 0]) if sequences > 1 else 0 for at in range(len(ids))]
        self.between = [np.array(ids[part], np.int64) for part in parts[::2]]
        self.types = [types[part][0] if types[part] else 0 for part in parts]
        self.size = len(ids) - plain * sequences

    def wrap(self, *sequences: np.ndarray) -> dict[str, np.ndarray]:
        """input_ids and token_type_ids, int64, of the sequences between their special tokens, and which are special."""
        parts = [self.between[0]]
        for sequence, after in zip(sequences, self.between[1:], strict=True):
            parts += [np.asarray(sequence, np.int64), after]
        lengths = [len(part) for part in parts]
        special = np.arange(len(parts)) % 2 == 0
        return {
            "input_ids": np.concatenate(parts),
            "token_type_ids": np.repeat(np.array(self.types, np.int64), lengths),
            "special_tokens_mask": np.repeat(special, lengths),
        }


def word_starts(text: str, word_ids: list[int | None], offsets: np.ndarray) -> np.ndarray:
    """(N,) bool: which tokens of a text begin a word. word_ids and offsets (N, 2) are those of a fast tokenizer.

    A word begins where the tokenizer's own does, after white space (tokenizers after SentencePiece may take a whole
    text as one word), and at every ideograph.
    """
    if not len(offsets):
        return np.zeros(0, bool)
    space, ideograph = np.zeros(len(text) + 2, bool), np.zeros(len(text) + 2, bool)
    for found in SPACE.finditer(text):
        space[found.start() : found.end()] = True
    for found in IDEOGRAPH.finditer(text):
        ideograph[found.start()] = True
    words = np.array([-1 if word is None else word for word in word_ids])
    start, end = offsets[:, 0], offsets[:, 1]
    before = np.maximum(start[1:] - 1, 0)
    begins = np.ones(len(offsets), bool)
    begins[1:] = (
        (words[1:] != words[:-1])
        | (space[start[1:]] & (start[1:] != start[:-1]))
        # A space that is a token of its own has begun the word already.
        | ((start[1:] > 0) & space[before] & (end[:-1] <= before))
        | (ideograph[start[1:]] & (start[1:] != start[:-1]))
    )
    return begins
