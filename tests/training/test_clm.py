"""Packing: every token once, no document beside itself, and no prediction across a border."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from llmkern.training.objectives import Batches, CausalLanguageModelingCollator, Corpus, PackedDocuments
from llmkern.training.objectives.clm import best_fit
from tests.training.small_tokenizers import KINDS, documents


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [2, 7, 33, 512])
def test_every_token_stands_once(kind, length):
    tokenizer, text = KINDS[kind](), documents(50, 40)
    packed = PackedDocuments(Corpus.build(text, tokenizer), tokenizer, length)
    pieces = {}
    assert max(len(row["input_ids"]) for row in packed) <= length
    for n, row in enumerate(packed):
        which = packed.pieces[packed.row_ends[n - 1] if n else 0 : packed.row_ends[n]]
        for k, (document, start, _) in enumerate(which):
            pieces[document, start] = row["input_ids"][row["document_ids"] == k]
        assert np.array_equal(np.unique(row["document_ids"]), np.arange(len(which)))
        begins = np.flatnonzero(np.diff(row["document_ids"], prepend=-1))
        assert (row["position_ids"][begins] == 0).all()
        assert (np.diff(row["position_ids"])[np.diff(row["document_ids"]) == 0] == 1).all()
    special = [t for t in (tokenizer.eos_token_id,) if t is not None]
    for n, document in enumerate(text):
        found = np.concatenate([pieces[key] for key in sorted(pieces) if key[0] == n])
        ids = tokenizer(document)["input_ids"]
        inner = tokenizer(document, add_special_tokens=False)["input_ids"]
        before = ids[:1] if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id else []
        assert found.tolist() == [*before, *inner, *special]


def test_rows_are_nearly_full():
    lengths = np.random.default_rng(0).integers(1, 150, 3000)
    rows = best_fit(lengths, 256)
    filled = np.bincount(rows, lengths)
    assert filled.max() <= 256 and filled.sum() == lengths.sum()
    assert len(filled) <= 1.01 * lengths.sum() / 256 + 1  # nearly no row more than there must be
    assert best_fit(np.array([5, 5, 5]), 5).tolist() == [0, 1, 2]
    assert best_fit(np.array([1, 3, 2, 2]), 4).tolist() == [0, 0, 1, 1]


def test_best_fit_is_that_of_the_definition():
    draws = np.random.default_rng(1)
    for _ in range(50):
        room = int(draws.integers(1, 20))
        lengths = draws.integers(1, room + 1, int(draws.integers(1, 40)))
        left, fits = [], best_fit(lengths, room)
        for piece in np.argsort(-lengths, kind="stable"):
            able = [r for r in left if r >= lengths[piece]]
            if able:
                left.remove(min(able))
            left.append((min(able) if able else room) - lengths[piece])
        assert sorted(room - np.bincount(fits, lengths)) == sorted(left)


def packed_batch(kind="WordPiece", length=48, size=4, **options):
    tokenizer = KINDS[kind]()
    data = PackedDocuments(Corpus.build(documents(30, 20), tokenizer), tokenizer, length)
    return next(iter(Batches(data, CausalLanguageModelingCollator(tokenizer, **options), size)))


def test_batches():
    batch = packed_batch(length=40, size=6)
    rows = (batch["document_ids"] >= 0).sum(1)
    assert batch["input_ids"].shape == (6, int(rows.max()))
    fixed = CausalLanguageModelingCollator(KINDS["WordPiece"](), length=64)([{"input_ids": np.arange(6, 16)}])
    assert fixed["input_ids"].shape == (1, 64)
    assert (fixed["document_ids"][0, :10] == 0).all() and (fixed["document_ids"][0, 10:] == -1).all()
    assert fixed["position_ids"][0].tolist() == [*range(10), *[0] * 54]
    assert fixed["labels"][0].tolist() == [-100, *range(7, 16), *[-100] * 54]
    assert fixed["attention_mask"][0].tolist() == [1] * 10 + [0] * 54
    assert all(value.dtype == torch.int64 for value in fixed.values())


@pytest.mark.parametrize("kind", KINDS)
def test_labels_count_no_first_token(kind):
    batch = packed_batch(kind)
    first = (batch["position_ids"] == 0) & (batch["attention_mask"] > 0)
    assert first.sum() > 4
    counted = batch["labels"] >= 0
    assert torch.equal(counted, (batch["attention_mask"] > 0) & ~first)
    assert torch.equal(batch["labels"][counted], batch["input_ids"][counted])


def test_a_packed_loss_is_that_of_its_documents():
    """A small model with attention within documents: packed, and each document alone."""
    batch = packed_batch()
    torch.manual_seed(0)
    embedding, places = torch.randn(200, 16), torch.randn(64, 16)

    def losses(ids, labels, document_ids, position_ids):
        x = embedding[ids] + places[position_ids]
        same = document_ids[:, :, None] == document_ids[:, None, :]
        mask = same & torch.ones(same.shape[1:], dtype=torch.bool).tril()
        logits = F.scaled_dot_product_attention(x, x, x, attn_mask=mask) @ embedding.T
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")

    names = ("input_ids", "labels", "document_ids", "position_ids")
    together = losses(*(batch[n] for n in names))
    collator = CausalLanguageModelingCollator(KINDS["WordPiece"]())
    alone = 0.0
    for ids, documents_of in zip(batch["input_ids"], batch["document_ids"], strict=True):
        for n in range(int(documents_of.max()) + 1):
            one = collator([{"input_ids": ids[documents_of == n].numpy()}])
            alone += losses(*(one[name] for name in names))
    torch.testing.assert_close(together, alone)


def test_wrong_arguments():
    tokenizer = KINDS["WordPiece"]()
    corpus = Corpus.build(["the cat sat"], tokenizer)
    with pytest.raises(
        ValueError, match="length: expected 2 or more, since the first token predicts the second, got 1"
    ):
        PackedDocuments(corpus, tokenizer, 1)
    with pytest.raises(ValueError, match="examples: expected at most 2 tokens in each, got 3"):
        CausalLanguageModelingCollator(tokenizer, length=2)([{"input_ids": [1, 2, 3]}])
    with pytest.raises(ValueError, match="examples: expected at least one, got none"):
        CausalLanguageModelingCollator(tokenizer)([])
    with pytest.raises(IndexError, match=r"index: expected a row in \[0, 1\), got 1"):
        PackedDocuments(corpus, tokenizer, 8)[1]
