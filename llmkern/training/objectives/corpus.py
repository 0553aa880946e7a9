"""Documents as token ids: in memory, or in files that are mapped and not read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llmkern import check
from llmkern.training.objectives.folders import in_turn, made_whole
from llmkern.training.objectives.tokenizer import fingerprint, word_starts

WORD_START, SENTENCE_START = 1, 2
FILES = {"tokens": np.int32, "marks": np.uint8, "ends": np.int64}
TOGETHER = 256  # documents that are tokenized, and held, at a time


class Corpus:
    """Documents as token ids, without special tokens; `corpus[i]` is document i, (N,) int32.

    Made by `Corpus.build` or `Corpus.load`. tokens (T,) int32: all documents end to end; ends (documents,) int64: where
    each ends in it; marks (T,) uint8: which tokens begin a word (bit 0) and a sentence (bit 1); vocabulary: the
    fingerprint of the tokenizer's; has_words, has_sentences: what is marked; empty: documents without a token, left
    out.
    """

    def __init__(self, tokens: np.ndarray, marks: np.ndarray, ends: np.ndarray, facts: dict[str, Any]) -> None:
        self.tokens, self.marks, self.ends = tokens, marks, ends
        self.vocabulary: str = facts["vocabulary"]
        self.has_words: bool = facts["words"]
        self.has_sentences: bool = facts["sentences"]
        self.empty: int = facts["empty"]
        self.folder: Path | None = None

    @classmethod
    def build(
        cls,
        documents: Iterable[str | Sequence[str]],
        tokenizer: Any,
        *,
        folder: str | os.PathLike[str] | None = None,
        reuse: bool = False,
        words: bool = False,
        language: str | None = None,
        progress: bool = False,
    ) -> Corpus:
        """Tokenizes a stream of documents, each a string or a sequence of sentences.

        tokenizer: any of transformers. What looks like a special token in the text becomes ordinary tokens. folder:
        where the ids are written as they come, so that no more than 256 documents and 8 bytes for each one are held; it
        must not exist yet, and does only when all is written. Without it everything is held, 5 bytes for a token.
        reuse: takes the corpus that is in the folder already, and draws no documents; whether they are the same is not
        known. Where there is none, one process builds it and others, torchrun's or whichever, wait and take it: the
        script of one process serves many, and a run that goes on. words: mark where words begin, for whole-word
        masking. language: an ISO 639 code with which sentencex finds the sentences of documents that are strings, for
        next sentence prediction; sequences are marked without. progress: show a bar.

        Raises TypeError for a document that is neither, ValueError for one with lone surrogates, where marks are wanted
        of a tokenizer without offsets (one that is not "fast"), where no document has a token, and with reuse for a
        corpus of another tokenizer, words or language; FileExistsError for a folder that is there without reuse, or
        that another process has meanwhile made otherwise.
        """
        check.flag("reuse", reuse)
        check.flag("words", words)
        check.flag("progress", progress)
        if reuse and folder is None:
            raise ValueError("folder: expected one with reuse, got None")
        target = None if folder is None else Path(folder)
        if target is not None and target.exists() and not reuse:
            raise FileExistsError(f"folder: expected one that does not exist yet, got {str(target)!r}")
        facts = {
            "vocabulary": fingerprint(tokenizer), "words": words, "sentences": language is not None, "empty": 0,
            "language": language,
        }  # fmt: skip
        parts = _tokenized(_documents(documents, language, tokenizer, words, progress), tokenizer, facts)
        if target is None:
            held = list(parts)
            arrays = {n: np.concatenate([p[i] for p in held] or [np.zeros(0, d)]) for i, (n, d) in enumerate(FILES.items())}  # fmt: skip # noqa: E501
            _check_some(len(arrays["ends"]))
            return cls(**arrays, facts=facts)
        if not reuse:
            _write(target, parts, facts)
            return cls.load(target)
        with in_turn(target):
            if not target.exists():
                _write(target, parts, facts)
        corpus = cls.load(target)
        corpus.check(tokenizer)
        found = json.loads((target / "corpus.json").read_text())
        for name, value in (("words", words), ("language", language)):
            if found.get(name, value) != value:
                expected = f"{found[name]!r} as the corpus in {str(target)!r} was built with"
                raise ValueError(f"{name}: expected {expected}, got {value!r}")
        return corpus

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Corpus:
        """One that `build` wrote, its tokens mapped: what is not asked for is not read.

        Raises FileNotFoundError for a folder that holds none.
        """
        path = Path(folder)
        if not (path / "corpus.json").exists():
            raise FileNotFoundError(f"folder: expected one that Corpus.build wrote, got {str(path)!r}")
        arrays = {name: np.memmap(path / name, dtype, "r") for name, dtype in FILES.items()}
        corpus = cls(**arrays, facts=json.loads((path / "corpus.json").read_text()))
        corpus.ends, corpus.folder = np.array(arrays["ends"]), path
        return corpus

    def __reduce__(self) -> Any:
        # Workers that are not forked map the files again: a mapped array would be sent whole.
        return (Corpus.load, (self.folder,)) if self.folder is not None else super().__reduce__()

    def __len__(self) -> int:
        return len(self.ends)

    def span(self, index: int) -> tuple[int, int]:
        """Where document `index` begins and ends in `tokens`. Raises IndexError where there is none."""
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected a document in [0, {len(self)}), got {index}")
        return int(self.ends[index - 1]) if index else 0, int(self.ends[index])

    def __getitem__(self, index: int) -> np.ndarray:
        start, end = self.span(index)
        return self.tokens[start:end]

    def subset(self, start: int, end: int) -> Corpus:
        """The documents from `start` to before `end`, in memory: to hold some out.

        Raises TypeError for what are no integers, ValueError where there are no such documents, or none between."""
        for name, value in (("start", start), ("end", end)):
            check.integer(name, int(value) if isinstance(value, np.integer) else value)
        if not 0 <= start < end <= len(self):
            raise ValueError(f"start, end: expected 0 <= start < end <= {len(self)}, got {start}, {end}")
        first, last = self.span(start)[0], self.span(end - 1)[1]
        facts = {"vocabulary": self.vocabulary, "words": self.has_words, "sentences": self.has_sentences, "empty": 0}
        tokens, marks = np.array(self.tokens[first:last]), np.array(self.marks[first:last])
        return Corpus(tokens, marks, self.ends[start:end] - first, facts)

    def check(self, tokenizer: Any) -> None:
        """Raises ValueError for a tokenizer with another vocabulary than the one that made the ids."""
        if fingerprint(tokenizer) != self.vocabulary:
            raise ValueError(
                "tokenizer: expected the one that the corpus was built with, got one of another vocabulary"
            )


def _write(target: Path, parts: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]], facts: dict[str, Any]) -> None:
    """The files of a corpus; `facts` are whole when the parts have been drawn."""
    with made_whole(target) as partial:
        with ExitStack() as stack:
            files: list[BinaryIO] = [stack.enter_context((partial / name).open("wb")) for name in FILES]
            count = 0
            for part in parts:
                count += len(part[2])
                for file, array in zip(files, part, strict=True):
                    file.write(array.tobytes())
        _check_some(count)
        (partial / "corpus.json").write_text(json.dumps(facts))


def _check_some(count: int) -> None:
    if not count:
        raise ValueError("documents: expected at least one with a token, got none")


def _documents(
    documents: Iterable[str | Sequence[str]], language: str | None, tokenizer: Any, words: bool, progress: bool
) -> Iterator[tuple[str, list[int]]]:
    """Each document's text, and where its sentences begin."""
    if (words or language is not None) and not getattr(tokenizer, "is_fast", False):
        name = type(tokenizer).__name__
        raise ValueError(
            f"tokenizer: expected one with offsets (is_fast) where words or sentences are marked, got {name}"
        )
    if isinstance(documents, str):
        raise TypeError("documents: expected an iterable of documents, got one string")
    if language is not None:
        check.text("language", language)
        from sentencex import segment
    if progress:
        from tqdm import tqdm

        documents = tqdm(documents, "tokenizing", unit=" documents")
    for number, document in enumerate(documents):
        if isinstance(document, str):
            pieces = list(segment(language, document)) if language is not None else [document]
        elif isinstance(document, Sequence) and all(isinstance(s, str) for s in document):
            pieces = [sentence + " " for sentence in document]
        else:
            raise TypeError(f"documents: expected strings or sequences of sentences, got {document!r:.80} at {number}")
        try:
            "".join(pieces).encode()
        except UnicodeEncodeError as error:
            found = f"got {error.object[error.start]!r} at {number}"
            raise ValueError(
                f"documents: expected no lone surrogates (training.data.repair mends them), {found}"
            ) from error
        begins = [0]
        for piece in pieces[:-1]:
            begins.append(begins[-1] + len(piece))
        # Pieces of white space alone are no sentences: what follows them begins where they do.
        kept = [at for at, piece in zip(begins, pieces, strict=False) if piece.strip()]
        yield "".join(pieces), kept


def _tokenized(
    stream: Iterable[tuple[str, list[int]]], tokenizer: Any, facts: dict[str, Any]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """tokens, marks and ends of some documents after others; counts those that are empty."""
    source, total = iter(stream), 0
    offsets = bool(getattr(tokenizer, "is_fast", False))
    while together := list(islice(source, TOGETHER)):
        texts = [text for text, _ in together]
        made = tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False,
            return_offsets_mapping=offsets, verbose=False,
        )  # fmt: skip
        tokens, marks, ends = [], [], []
        for i, (text, begins) in enumerate(together):
            ids = np.array(made["input_ids"][i], np.int32)
            if not len(ids):
                facts["empty"] += 1
                continue
            mark = np.zeros(len(ids), np.uint8)
            if offsets:
                places = np.array(made["offset_mapping"][i], np.int64).reshape(-1, 2)
                if facts["words"]:
                    mark |= np.where(word_starts(text, made.word_ids(i), places), WORD_START, 0).astype(np.uint8)
                if len(begins) > 1 or facts["sentences"]:
                    facts["sentences"] = True
                    # The first token that reaches beyond the place: it may hold the space before.
                    first = np.searchsorted(np.maximum.accumulate(places[:, 1]), begins, side="right")
                    mark[first[first < len(ids)]] |= SENTENCE_START
            mark[0] |= SENTENCE_START
            tokens.append(ids)
            marks.append(mark)
            ends.append(total := total + len(ids))
        empty = np.zeros(0, np.int32)
        yield (
            np.concatenate([empty, *tokens]),
            np.concatenate([empty.astype(np.uint8), *marks]),
            np.array(ends, np.int64),
        )
