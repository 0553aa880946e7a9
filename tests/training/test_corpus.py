"""Documents as token ids: in memory and in files, with their words and sentences."""

from __future__ import annotations

import os
import pickle
import signal
import stat
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from llmkern.training.objectives import Corpus
from llmkern.training.objectives.corpus import SENTENCE_START
from tests.training.racing import TEXTS
from tests.training.small_tokenizers import KINDS, byte_level, documents, numbered, word_piece


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
    assert os.listdir(tmp_path) == ["corpus"] and isinstance(mapped.tokens, np.memmap)
    (tmp_path / "other").mkdir()
    assert stat.S_IMODE((tmp_path / "corpus").stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)
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
    assert not os.listdir(tmp_path)
    assert len(Corpus.build(["the cat"], word_piece(), folder=tmp_path / "corpus")) == 1
    with pytest.raises(FileExistsError, match="expected one that does not exist yet"):
        Corpus.build(["the cat"], word_piece(), folder=tmp_path / "corpus")


def racing(folder: Path, name: str, what: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.training.racing", str(folder), name, what]
    root = Path(__file__).parents[2]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def outcome(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return out


@pytest.mark.parametrize("what", ["together", "reuse"])
def test_two_processes_that_build_the_same_lose_nothing(tmp_path, what):
    """Both in the middle of it at once; and with reuse, one after the other has done the work."""
    assert list(map(outcome, [racing(tmp_path, name, what) for name in "ab"])) == ["600\n", "600\n"]
    corpus, held = Corpus.load(tmp_path / "corpus"), Corpus.build(TEXTS, numbered(610))
    assert np.array_equal(corpus.tokens, held.tokens) and np.array_equal(corpus.ends, held.ends)
    assert len(list(tmp_path.glob("*-drew"))) == (2 if what == "together" else 1)
    assert [p.name for p in tmp_path.glob("corpus*")] == ["corpus"]


def test_one_that_is_killed_leaves_the_work_to_the_next(tmp_path):
    killed = racing(tmp_path, "a", "killed")
    killed.communicate(timeout=200)
    assert killed.returncode == -signal.SIGKILL and (tmp_path / "a-drew").exists()
    assert len(Corpus.build(TEXTS, numbered(610), folder=tmp_path / "corpus", reuse=True)) == 600


@pytest.mark.parametrize("same", [True, False])
def test_one_made_meanwhile_stays(tmp_path, same):
    def stream():
        yield "w1 w2"
        Corpus.build(["w1 w2" if same else "w1 w2 w3"], numbered(4), folder=tmp_path / "corpus")

    if same:
        assert len(Corpus.build(stream(), numbered(4), folder=tmp_path / "corpus")) == 1
    else:
        with pytest.raises(FileExistsError, match=r"the same documents by the same tokenizer, got '.*corpus', which"):
            Corpus.build(stream(), numbered(4), folder=tmp_path / "corpus")
    assert len(Corpus.load(tmp_path / "corpus")[0]) == (2 if same else 3) and os.listdir(tmp_path) == ["corpus"]


def test_what_is_there_is_taken_if_it_was_made_alike(tmp_path, capsys):
    def never():
        raise AssertionError("drawn")
        yield

    options = {"tokenizer": word_piece(), "folder": tmp_path / "new" / "c", "reuse": True, "language": "en"}
    first = Corpus.build(["the cat. It sat."], progress=True, **options)
    assert "tokenizing: 100%" in capsys.readouterr().err
    again = Corpus.build(never(), progress=True, **options)
    assert not capsys.readouterr().err  # no bar for what is not done
    assert np.array_equal(again.tokens, first.tokens) and os.listdir(tmp_path / "new") == ["c"]
    for changes, words in (
        ({"tokenizer": byte_level()}, "tokenizer: expected the one that the corpus was built with"),
        ({"words": True}, r"words: expected False as the corpus in '.*c' was built with, got True"),
        ({"language": "de"}, r"language: expected 'en' as the corpus in '.*c' was built with, got 'de'"),
        ({"folder": None}, "folder: expected one with reuse, got None"),
    ):
        with pytest.raises(ValueError, match=words):
            Corpus.build(never(), **(options | changes))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"folder: expected one that Corpus\.build wrote"):
        Corpus.build(never(), word_piece(), folder=tmp_path / "empty", reuse=True)


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
