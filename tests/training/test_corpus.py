"""Documents as token ids: in memory and in files, with their words and sentences."""

from __future__ import annotations

import pickle
from itertools import pairwise

import numpy as np
import pytest

from llmkern.training.objectives import Corpus
from llmkern.training.objectives.corpus import SENTENCE_START
from tests.training.small_tokenizers import KINDS, documents, word_piece


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_the_tokenizers(kind):
    tokenizer, text = KINDS[kind](), documents(600, 12)
    corpus = Corpus.build(text, tokenizer)
    assert len(corpus) == 600
    for i in (0, 255, 256, 599):
        assert corpus[i].tolist() == tokenizer(text[i], add_special_tokens=False)["input_ids"]


def test_in_files_as_in_memory(tmp_path):
    tokenizer, text = word_piece(), documents(300, 12)
    held = Corpus.build(text, tokenizer, words=True, language="en")
    mapped = Corpus.build(iter(text), tokenizer, words=True, language="en", folder=tmp_path / "corpus")
    assert not (tmp_path / "corpus.part").exists() and isinstance(mapped.tokens, np.memmap)
    again = pickle.loads(pickle.dumps(mapped))
    sent = pickle.loads(pickle.dumps(held))
    assert len(pickle.dumps(mapped)) < 500  # its folder, not what lies there
    for other in (mapped, again, sent, Corpus.load(tmp_path / "corpus")):
        for name in ("tokens", "marks", "ends"):
            assert np.array_equal(getattr(other, name), getattr(held, name))
        assert other.has_words and other.has_sentences and other.vocabulary == held.vocabulary
    part = held.subset(10, 20)
    assert len(part) == 10 and all(np.array_equal(part[i], held[10 + i]) for i in range(10))
    count = len(held)
    assert len(held.subset(np.int64(0), count)) == count
    for start, end in ((0, 0), (5, 3), (-1, 2), (0, count + 1)):
        with pytest.raises(ValueError, match=rf"start, end: expected 0 <= start < end <= {count}, got {start}, {end}"):
            held.subset(start, end)
    with pytest.raises(TypeError, match=r"end: expected an integer, got 2\.5"):
        held.subset(0, 2.5)


def test_a_broken_run_leaves_no_corpus(tmp_path):
    def broken():
        yield "the cat"
        raise RuntimeError("the source ends here")

    with pytest.raises(RuntimeError, match="the source ends here"):
        Corpus.build(broken(), word_piece(), folder=tmp_path / "corpus")
    with pytest.raises(FileNotFoundError, match=r"expected one that Corpus\.build wrote"):
        Corpus.load(tmp_path / "corpus")
    assert len(Corpus.build(["the cat"], word_piece(), folder=tmp_path / "corpus")) == 1
    with pytest.raises(FileExistsError, match="expected one that does not exist yet"):
        Corpus.build(["the cat"], word_piece(), folder=tmp_path / "corpus")


def test_no_more_than_some_documents_are_held():
    taken = 0

    def stream():
        nonlocal taken
        for text in documents(2000, 6):
            taken += 1
            yield text

    class Watching:
        """Remembers how many documents had been asked for when the first were tokenized."""

        def __init__(self, tokenizer):
            self.tokenizer, self.first = tokenizer, None

        def __call__(self, texts, **options):
            self.first = self.first or taken
            return self.tokenizer(texts, **options)

        def __getattr__(self, name):
            return getattr(self.tokenizer, name)

    watching = Watching(word_piece())
    assert len(Corpus.build(stream(), watching)) == 2000
    assert watching.first <= 256


SENTENCES = ["The cat sat.", "It rained again!", "Nobody came; Mr. Smith (e.g.) went."]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", [False, True])
def test_sentences(kind, split):
    tokenizer = KINDS[kind]()
    document = SENTENCES if split else " ".join(SENTENCES)
    corpus = Corpus.build([document], tokenizer, language=None if split else "en")
    assert corpus.has_sentences
    begins = [*np.flatnonzero(corpus.marks & SENTENCE_START), len(corpus.tokens)]
    found = [corpus.tokens[a:b] for a, b in pairwise(begins)]
    assert len(found) == 3
    text = " ".join(SENTENCES)
    ends = np.array(tokenizer([text], add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"][0])[:, 1]
    for at, sentence in zip(begins[1:-1], SENTENCES[1:], strict=True):
        # A token that holds the space before is the sentence's first.
        assert ends[at - 1] <= text.index(sentence) < ends[at]


def test_documents_without_a_token_are_counted():
    corpus = Corpus.build(["the cat", "", "   ", "sat"], word_piece())
    assert len(corpus) == 2 and corpus.empty == 2


def test_wrong_documents():
    tokenizer = word_piece()
    for wrong, error, words in (
        (["the cat", 3], TypeError, "expected strings or sequences of sentences, got 3 at 1"),
        ("the cat", TypeError, "expected an iterable of documents, got one string"),
        (["the cat", "a\ud800"], ValueError, r"expected no lone surrogates .* got '\\ud800' at 1"),
        ([""], ValueError, "expected at least one with a token"),
    ):
        with pytest.raises(error, match=words):
            Corpus.build(wrong, tokenizer)
    with pytest.raises(IndexError, match=r"expected a document in \[0, 1\), got 1"):
        Corpus.build(["the cat"], tokenizer)[1]
