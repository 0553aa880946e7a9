"""Masked language modelling: rates, whole words, special tokens, and what a position draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmkern.training.objectives import Batches, Corpus, MaskedLanguageModelingCollator, TextBlocks
from llmkern.training.objectives.corpus import WORD_START
from llmkern.training.objectives.tokenizer import ordinary_ids, special_ids, word_starts
from tests.training.small_tokenizers import KINDS, documents, is_likely, numbered, word_piece


def blocks(tokenizer, length=64, words=True, count=60):
    return TextBlocks(Corpus.build(documents(count, 60), tokenizer, words=words), tokenizer, length)


def batches(data, tokenizer, size=16, **options):
    return Batches(data, MaskedLanguageModelingCollator(tokenizer, **options), size, epochs=1, drop_last=False)


def originals(batch):
    return torch.where(batch["labels"] >= 0, batch["labels"], batch["input_ids"])


@pytest.mark.parametrize("whole_word", [False, True])
def test_rates(whole_word):
    tokenizer = numbered(2000)  # a word is a token: one draw for each either way
    text = [" ".join(f"w{i}" for i in np.random.default_rng(n).integers(2000, size=500)) for n in range(60)]
    data = TextBlocks(Corpus.build(text, tokenizer, words=True), tokenizer, 128)
    tokens = chosen = masked = kept = 0
    for batch in batches(data, tokenizer, whole_word=whole_word):
        is_chosen = batch["labels"] >= 0
        tokens += int(batch["attention_mask"].sum())
        chosen += int(is_chosen.sum())
        masked += int((batch["input_ids"][is_chosen] == tokenizer.mask_token_id).sum())
        kept += int((batch["input_ids"] == batch["labels"]).sum())
    assert tokens == 30000
    assert is_likely(chosen, tokens, 0.15) and is_likely(masked, chosen, 0.8)
    # Kept, or replaced by itself.
    assert is_likely(kept, chosen, 0.1 + 0.1 / 2000)


def test_another_token_is_any_ordinary_one():
    tokenizer = numbered(50)
    data = TextBlocks(Corpus.build(["w7 " * 20000], tokenizer), tokenizer, 200)
    found = torch.zeros(len(tokenizer), dtype=torch.int64)
    for batch in batches(data, tokenizer, probability=1.0, mask=0.0, random=1.0):
        found += torch.bincount(batch["input_ids"].flatten(), minlength=len(tokenizer))
    assert not found[special_ids(tokenizer)].any()
    assert all(is_likely(n, 20000, 1 / 50) for n in found[ordinary_ids(tokenizer)])


@pytest.mark.parametrize("kind", KINDS)
def test_words_begin_where_they_do(kind):
    tokenizer = KINDS[kind]()
    text = "The unbelievable cat, again: it's 東京です café"
    corpus = Corpus.build([text], tokenizer, words=True)
    encoded = tokenizer([text], add_special_tokens=False, return_offsets_mapping=True)
    starts = [a for (a, _), m in zip(encoded["offset_mapping"][0], corpus.marks, strict=True) if m & WORD_START]
    assert len(corpus.marks) > len(starts)  # there are longer words
    # The space before a word is its own, or none's.
    begun = {a + (text[a] == " ") for a in starts}
    assert {text.index(w) for w in ("The", "unb", "cat", "again", "it", "東", "京", "caf")} <= begun
    inside = {i for w in ("unbelievable", "again", "café") for i in range(text.index(w) + 1, text.index(w) + len(w))}
    assert not begun & inside


def test_a_space_that_no_token_holds_parts_words():
    offsets = np.array([[0, 2], [3, 4], [4, 5]])
    assert word_starts("ab cd", [0, 0, 0], offsets).tolist() == [True, True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_whole_words(kind):
    tokenizer = KINDS[kind]()
    data = blocks(tokenizer)
    chosen_words = all_words = longer = 0
    seen = 0
    for batch in batches(data, tokenizer, whole_word=True):
        for ids, labels, mask in zip(originals(batch), batch["labels"], batch["attention_mask"], strict=True):
            ids, labels = ids[mask > 0], labels[mask > 0]
            # The text of a block, its words as white space parts them: each is chosen as a whole or not at all.
            example = next(e for e in data if np.array_equal(e["input_ids"], ids.numpy()))
            unit = np.cumsum(example["word_starts"])
            for word in np.unique(unit[~example["special_tokens_mask"]]):
                which = (unit == word) & ~example["special_tokens_mask"]
                fate = (labels.numpy() >= 0)[which]
                assert fate.all() or not fate.any()
                chosen_words, all_words = chosen_words + fate.any(), all_words + 1
                longer += which.sum() > 1
            seen += 1
    assert seen == len(data) and longer > 30
    assert is_likely(chosen_words, all_words, 0.15)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_hold_the_documents_and_end_between_words(kind):
    tokenizer = KINDS[kind]()
    data = blocks(tokenizer, length=24)
    text = np.concatenate([e["input_ids"][~e["special_tokens_mask"]] for e in data])
    assert np.array_equal(text, data.corpus.tokens)
    assert max(len(e["input_ids"]) for e in data) <= 24
    alone = tokenizer("cat", add_special_tokens=False)["input_ids"]
    assert data[0]["special_tokens_mask"].sum() == len(tokenizer("cat")["input_ids"]) - len(alone)
    assert all(e["word_starts"][~e["special_tokens_mask"]][0] for e in data)


@pytest.mark.parametrize("whole_word", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_never_chosen_nor_put_in(kind, whole_word):
    tokenizer = KINDS[kind]()
    special = torch.from_numpy(special_ids(tokenizer))
    data = blocks(tokenizer, length=16)
    for batch in batches(data, tokenizer, whole_word=whole_word, probability=1.0, mask=0.0, random=1.0):
        is_special = torch.isin(originals(batch), special) & (batch["attention_mask"] > 0)
        assert (batch["labels"][is_special] == -100).all()
        assert (batch["labels"][(batch["attention_mask"] > 0) & ~is_special] >= 0).all()
        assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
        assert not torch.isin(batch["input_ids"][batch["labels"] >= 0], special).any()


def test_special_tokens_in_a_text_are_text():
    tokenizer = word_piece()
    corpus = Corpus.build(["the [SEP] cat [MASK] [PAD] sat"], tokenizer)
    assert not np.isin(corpus.tokens, special_ids(tokenizer)[special_ids(tokenizer) != tokenizer.unk_token_id]).any()


def test_an_added_special_token_is_special():
    tokenizer = numbered(30)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    assert tokenizer.convert_tokens_to_ids("<tool>") in special_ids(tokenizer)


def test_something_is_always_chosen():
    tokenizer = numbered(50)
    collator = MaskedLanguageModelingCollator(tokenizer)
    examples = [{"input_ids": np.array([tokenizer.cls_token_id, 9, 10]), "position": n} for n in range(500)]
    labels = collator(examples)["labels"]
    assert (labels >= 0).any(1).all() and (labels[:, 0] == -100).all()
    assert is_likely((labels >= 0).sum(), 1000, 0.15 + 0.85**2 / 2)
    none = collator([{"input_ids": np.array([tokenizer.cls_token_id]), "position": 0}])
    assert (none["labels"] == -100).all()


def test_a_position_draws_the_same_whatever_was_drawn_before():
    tokenizer = numbered(50)
    collator = MaskedLanguageModelingCollator(tokenizer, seed=3)
    examples = [{"input_ids": np.arange(6, 46), "position": n} for n in range(20)]
    together = collator(examples)["input_ids"]
    alone = torch.cat([collator([examples[n]])["input_ids"] for n in reversed(range(20))]).flip(0)
    assert torch.equal(together, alone)
    assert len({tuple(row.tolist()) for row in together}) == 20
    other = MaskedLanguageModelingCollator(tokenizer, seed=4)(examples)["input_ids"]
    assert not torch.equal(other, together)


def test_padding_goes_to_a_multiple():
    tokenizer = numbered(50)
    collator = MaskedLanguageModelingCollator(tokenizer, pad_to_multiple_of=8)
    batch = collator([{"input_ids": np.arange(6, 6 + n), "position": n} for n in (3, 11)])
    assert batch["input_ids"].shape == (2, 16) and batch["attention_mask"].sum() == 14
    assert (batch["input_ids"][0, 3:] == tokenizer.pad_token_id).all()


WRONG = {
    "a probability": ({"probability": 1.5}, ValueError, "probability: expected a probability in"),
    "shares": ({"mask": 0.9, "random": 0.2}, ValueError, "random: expected at most 1 - mask = 0.1, got 0.2"),
    "a seed": ({"seed": "x"}, TypeError, "seed: expected an integer"),
    "a flag": ({"whole_word": 1}, TypeError, "whole_word: expected True or False"),
    "a multiple": ({"pad_to_multiple_of": 0}, ValueError, "pad_to_multiple_of: expected a positive"),
}


@pytest.mark.parametrize(("options", "error", "words"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(options, error, words):
    with pytest.raises(error, match=words):
        MaskedLanguageModelingCollator(numbered(50), **options)


def test_wrong_tokenizers_corpora_and_examples():
    tokenizer, other = numbered(50), numbered(51)
    corpus = Corpus.build(["w1 w2 w3"], tokenizer)
    with pytest.raises(ValueError, match="tokenizer: expected the one that the corpus was built with"):
        TextBlocks(corpus, other, 16)
    with pytest.raises(ValueError, match="length: expected more than the 2 special tokens, got 2"):
        TextBlocks(Corpus.build(["the cat"], word_piece()), word_piece(), 2)
    with pytest.raises(ValueError, match="'word_starts' in each, got"):
        MaskedLanguageModelingCollator(tokenizer, whole_word=True)([{"input_ids": [7], "position": 0}])
    with pytest.raises(ValueError, match="'position' in each, got"):
        MaskedLanguageModelingCollator(tokenizer)([{"input_ids": [7]}])
    without = numbered(52)
    without.mask_token = None
    with pytest.raises(ValueError, match="expected one with a mask_token"):
        MaskedLanguageModelingCollator(without)
