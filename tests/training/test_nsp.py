"""Sentence pairs: half follow, half come from another document, and lengths tell nothing."""

from __future__ import annotations

import numpy as np
import pytest

from llmkern.training.objectives import (
    Batches,
    Corpus,
    MaskedLanguageModelingCollator,
    NextSentenceCollator,
    SentencePairs,
)
from llmkern.training.objectives.nsp import IS_NEXT, IS_RANDOM
from tests.training.small_tokenizers import KINDS, documents, is_likely, numbered

SIZE = 40  # documents, of SIZE sentences of five words: word w<n> tells its place


def numbered_corpus(tokenizer, words_per_sentence=5, size=SIZE):
    n, made = 0, []
    for _ in range(size):
        sentences = []
        for _ in range(size):
            sentences.append(" ".join(f"w{n + k}" for k in range(words_per_sentence)))
            n += words_per_sentence
        made.append(sentences)
    return Corpus.build(made, tokenizer, words=True)


@pytest.fixture(scope="module")
def prepared():
    tokenizer = numbered(SIZE * SIZE * 5)
    return tokenizer, numbered_corpus(tokenizer)


def segments(example):
    ids = np.flatnonzero(~example["special_tokens_mask"])
    types = example["token_type_ids"][ids]
    return [example["input_ids"][ids[types == k]] - 5 for k in (0, 1)]


def test_pairs_are_what_their_label_says(prepared):
    tokenizer, corpus = prepared
    pairs = SentencePairs(corpus, tokenizer, 32, short=0.0)
    labels = []
    for position in range(2000):
        example = pairs.draw(position % len(pairs), position)
        first, second = segments(example)
        assert len(first) and len(second) and len(example["input_ids"]) <= 32
        for part in (first, second):
            assert np.array_equal(part, np.arange(part[0], part[0] + len(part)))
        document = [part[0] // (SIZE * 5) for part in (first, second)]
        assert all(part[-1] // (SIZE * 5) == d for part, d in zip((first, second), document, strict=True))
        label = example["next_sentence_label"]
        labels.append(label)
        if label == IS_RANDOM:
            assert document[0] != document[1]
        else:
            assert document[0] == document[1] and 0 < second[0] - first[-1] <= 5
    assert is_likely(labels.count(IS_NEXT), 2000, 0.5)


def test_untruncated_segments_are_whole_sentences(prepared):
    tokenizer, corpus = prepared
    pairs = SentencePairs(corpus, tokenizer, 60, short=0.0)
    for position in range(len(pairs)):
        for part in segments(pairs[position]):
            assert part[0] % 5 == 0 and part[-1] % 5 == 4
    covered = sum(int(pairs.sentences[b] - pairs.sentences[a]) for a, b in pairs.runs)
    assert covered == len(corpus.tokens)
    # Three sentences a run leave one at the end of each document: it joins the last.
    runs = SentencePairs(corpus, tokenizer, 15).runs
    assert len(runs) == SIZE * (SIZE // 3) and (runs[1:, 0] == runs[:-1, 1]).all()


def test_random_segments_come_from_every_other_document_alike(prepared):
    tokenizer, corpus = prepared
    pairs = SentencePairs(corpus, tokenizer, 32)
    counts, total = np.zeros(SIZE), 0
    for position in range(6000):
        example = pairs.draw(0, position)  # of document 0
        if example["next_sentence_label"] == IS_RANDOM:
            counts[segments(example)[1][0] // (SIZE * 5)] += 1
            total += 1
    assert counts[0] == 0 and is_likely(total, 6000, 0.5)
    assert all(is_likely(n, total, 1 / (SIZE - 1)) for n in counts[1:])


def test_short_pairs(prepared):
    tokenizer, corpus = prepared
    full = SentencePairs(corpus, tokenizer, 64, short=0.0)
    lengths = [len(full.draw(n % len(full), n)["input_ids"]) for n in range(1000)]
    pairs = SentencePairs(corpus, tokenizer, 64, short=1.0)
    cut = [len(pairs.draw(n % len(pairs), n)["input_ids"]) for n in range(1000)]
    assert np.mean(lengths) == 50  # runs of 60, 60, 60 and 20 tokens
    assert min(cut) < 10
    assert 20 < np.mean(cut) < 40


def test_lengths_do_not_give_the_label_away(prepared):
    tokenizer, corpus = prepared
    pairs = SentencePairs(corpus, tokenizer, 64, short=0.0)
    examples = [pairs.draw(n % len(pairs), n) for n in range(3000)]
    found = [[len(segments(e)[1]) for e in examples if e["next_sentence_label"] == k] for k in (IS_NEXT, IS_RANDOM)]
    error = np.sqrt(sum(np.var(f) / len(f) for f in found))
    assert abs(np.mean(found[0]) - np.mean(found[1])) < 5 * error
    assert max(map(max, found)) == max(found[1])


@pytest.mark.parametrize("kind", KINDS)
def test_every_tokenizer(kind):
    tokenizer = KINDS[kind]()
    text = [documents(8, 14, seed=n) for n in range(12)]
    corpus = Corpus.build(text, tokenizer, words=True)
    pairs = SentencePairs(corpus, tokenizer, 40)
    expected = tokenizer("the cat", "the cat", return_special_tokens_mask=True)
    for example in pairs:
        assert len(example["input_ids"]) <= 40 and set(example["token_type_ids"]) == {0, 1}
        assert (np.diff(example["token_type_ids"]) >= 0).all()
        assert example["special_tokens_mask"].sum() == tokenizer.num_special_tokens_to_add(True)
        kept = example["input_ids"][example["special_tokens_mask"]]
        special = np.array(expected["special_tokens_mask"], bool)
        assert np.array_equal(kept, np.array(expected["input_ids"])[special])
    batches = Batches(pairs, MaskedLanguageModelingCollator(tokenizer, whole_word=True), 8)
    batch = next(iter(batches))
    assert set(batch) == {"input_ids", "attention_mask", "labels", "token_type_ids", "next_sentence_label"}
    assert batch["next_sentence_label"].shape == (8,) and batch["token_type_ids"].shape == batch["labels"].shape
    alone = next(iter(Batches(pairs, NextSentenceCollator(tokenizer), 8)))
    assert "labels" not in alone and (alone["next_sentence_label"] == batch["next_sentence_label"]).all()


def test_long_sentences_and_lone_ones():
    tokenizer = numbered(400)
    long = [" ".join(f"w{i}" for i in range(90 * k, 90 * (k + 1))) for k in range(4)]
    corpus = Corpus.build([long[:2], [long[2]], long[3:]], tokenizer)
    pairs = SentencePairs(corpus, tokenizer, 16, short=0.0)
    assert len(pairs) == 1 and pairs.single == 2
    for position in range(200):
        example = pairs.draw(0, position)
        first, second = segments({**example, "token_type_ids": example["token_type_ids"]})
        assert len(first) + len(second) == 16 and abs(len(first) - len(second)) <= 1
        assert (second[0] >= 180) == (example["next_sentence_label"] == IS_RANDOM)


def test_wrong_corpora_and_arguments(prepared):
    tokenizer, corpus = prepared
    two = [["w1 w2", "w3"], ["w4"]]
    with pytest.raises(ValueError, match="corpus: expected one with sentences marked"):
        SentencePairs(Corpus.build(["w1 w2", "w3"], tokenizer), tokenizer, 32)
    with pytest.raises(ValueError, match="expected two documents or more, to pair sentences of both, got 1"):
        SentencePairs(Corpus.build(two[:1], tokenizer), tokenizer, 32)
    with pytest.raises(ValueError, match="expected a document of two sentences or more"):
        SentencePairs(Corpus.build(["w1", "w2"], tokenizer, language="en"), tokenizer, 32)
    with pytest.raises(ValueError, match="length: expected 2 or more, got 1"):
        SentencePairs(corpus, tokenizer, 1)
    with pytest.raises(ValueError, match="short: expected a probability"):
        SentencePairs(corpus, tokenizer, 32, short=2.0)
