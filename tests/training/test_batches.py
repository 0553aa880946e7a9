"""The order of batches: by seed and position alone, resumed anywhere, shared among ranks and workers."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from torch.utils.data import DataLoader

from llmkern.training.objectives import (
    Batches,
    CausalLanguageModelingCollator,
    Corpus,
    MaskedLanguageModelingCollator,
    PackedDocuments,
    SentencePairs,
    TextBlocks,
)
from tests.training.small_tokenizers import documents, numbered, word_piece


def numbers(examples):
    return {name: torch.tensor([e[name] for e in examples]) for name in ("n", "position")}


DATA = [{"n": i} for i in range(23)]


def seen(batches):
    return [n for batch in batches for n in batch["n"].tolist()]


def objective(name, epochs=2, **options):
    tokenizer, corpus = prepared()
    if name == "mlm":
        data, collator = TextBlocks(corpus, tokenizer, 32), MaskedLanguageModelingCollator(tokenizer, whole_word=True)
    elif name == "nsp":
        data, collator = SentencePairs(corpus, tokenizer, 32), MaskedLanguageModelingCollator(tokenizer)
    else:
        data, collator = PackedDocuments(corpus, tokenizer, 64), CausalLanguageModelingCollator(tokenizer, length=64)
    return Batches(data, collator, 4, epochs=epochs, seed=11, **options)


def prepared(made=[]):  # noqa: B006 (built once)
    if not made:
        text = [[*documents(3, 12, seed=i)] for i in range(14)]
        made += [word_piece(), Corpus.build(text, word_piece(), words=True)]
    return made


def equal(a, b):
    return len(a) == len(b) and all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True))  # fmt: skip # noqa: E501


@pytest.mark.parametrize("name", ["mlm", "nsp", "clm"])
def test_resumed_at_every_position(name):
    whole = list(objective(name))
    assert len(whole) == len(objective(name)) > 6
    source = objective(name)
    for position in range(len(whole) + 1):
        state = source.state_dict()
        resumed = objective(name)
        resumed.load_state_dict(state)
        assert equal(list(resumed), whole[position:])
        next(iter(source), None)
    # Backwards, and one alone.
    assert equal([objective(name).batch(n) for n in reversed(range(len(whole)))], whole[::-1])


@pytest.mark.parametrize("name", ["mlm", "nsp", "clm"])
def test_the_next_epoch_differs(name):
    batches = objective(name, epochs=None)
    examples, first, second = len(batches.dataset), [], []
    for number in range(examples):  # four epochs of batches of four
        (first if number < examples // 4 else second).append(batches.batch(number))
    assert not equal(first, second[: len(first)])
    # Among all epochs, an example is not hidden alike, nor paired alike.
    if name != "clm":
        rows = [tuple(row.tolist()) for batch in [*first, *second] for row in batch["input_ids"]]
        assert len(set(rows)) > 0.9 * len(rows)


def test_workers_give_the_same_in_order():
    whole = list(objective("mlm"))
    shared = objective("mlm", num_workers=2)
    assert equal(list(shared), whole)
    # What workers prepared and was not taken is not counted.
    stopped = objective("mlm", num_workers=2)
    taken = list(islice(stopped, 3))
    assert equal(taken, whole[:3]) and stopped.state_dict()["position"] == 3
    assert equal(list(islice(stopped, 2)), whole[3:5])
    # A loader of one's own around it.
    assert equal(list(DataLoader(objective("mlm"), batch_size=None, num_workers=2)), whole)


def test_workers_draw_nothing_from_the_generator_of_all():
    before = torch.get_rng_state()
    next(iter(objective("mlm", num_workers=1)))
    assert torch.equal(torch.get_rng_state(), before)


def test_every_example_once_an_epoch():
    one = seen(Batches(DATA, numbers, 5, epochs=3, drop_last=False))
    assert len(one) == 69
    for epoch in range(3):
        assert sorted(one[23 * epoch : 23 * (epoch + 1)]) == list(range(23))
    assert one[:23] != one[23:46]
    assert seen(Batches(DATA, numbers, 5, epochs=1, shuffle=False, drop_last=False)) == list(range(23))
    assert len(seen(Batches(DATA, numbers, 5, epochs=1))) == 20
    assert one != seen(Batches(DATA, numbers, 5, epochs=3, seed=1, drop_last=False))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_an_epoch(world, workers):
    whole = seen(Batches(DATA, numbers, 2 * world, epochs=2))
    ranks = [
        list(Batches(DATA, numbers, 2, epochs=2, rank=r, world_size=world, num_workers=workers)) for r in range(world)
    ]
    assert len({len(rank) for rank in ranks}) == 1
    parts = [seen(rank) for rank in ranks]
    first = [{n for batch in rank[: 23 // (2 * world)] for n in batch["n"].tolist()} for rank in ranks]
    assert sum(map(len, first)) == len(set.union(*first))  # disjoint within the first epoch
    together = [n for step in zip(*ranks, strict=True) for batch in step for n in batch["n"].tolist()]
    assert together == whole and sum(map(len, parts)) == len(whole)


def test_ranks_see_disjoint_documents():
    tokenizer = numbered(90)
    text = [" ".join([f"w{i}"] * (3 + i % 7)) for i in range(90)]
    data = PackedDocuments(Corpus.build(text, tokenizer), tokenizer, 16)
    ranks = [
        Batches(data, CausalLanguageModelingCollator(tokenizer), 2, epochs=1, rank=r, world_size=3) for r in range(3)
    ]
    found = [{int(i) for batch in rank for i in batch["input_ids"][batch["attention_mask"] > 0]} for rank in ranks]
    assert all(found) and sum(map(len, found)) == len(set.union(*found))


def test_other_ranks_take_up_a_state():
    wide = Batches(DATA, numbers, 6, epochs=3)
    taken = seen(islice(wide, 4))
    two = [Batches(DATA, numbers, 3, epochs=3, rank=r, world_size=2) for r in range(2)]
    for rank in two:
        rank.load_state_dict(wide.state_dict())
    together = [n for step in zip(*two, strict=True) for batch in step for n in batch["n"].tolist()]
    assert taken + together == seen(Batches(DATA, numbers, 6, epochs=3))


WRONG = {
    "a rank": ({"rank": 2, "world_size": 2}, ValueError, r"rank: expected one in \[0, 2\), got 2"),
    "a size": ({"batch_size": 0}, ValueError, "batch_size: expected a positive integer, got 0"),
    "too large a batch": ({"batch_size": 24}, ValueError, "at most the 23 examples of 1 epochs"),
    "uneven ranks": ({"world_size": 2, "drop_last": False}, ValueError, "drop_last: expected True with 2 ranks"),
    "no examples": ({"dataset": []}, ValueError, "dataset: expected one with examples"),
    "workers": ({"num_workers": -1}, ValueError, "num_workers: expected 0 or more, got -1"),
}


@pytest.mark.parametrize(("options", "error", "words"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(options, error, words):
    with pytest.raises(error, match=words):
        Batches(**{"dataset": DATA, "collator": numbers, "batch_size": 2, "epochs": 1, **options})


def test_examples_that_are_no_dicts_are_named():
    """As torch's TensorDataset gives them."""
    with pytest.raises(TypeError, match=r"dataset: expected examples that map names to values .*, got tuple at 0"):
        next(iter(Batches([(1, 2)], numbers, 1)))


def test_states_of_another_run_are_refused():
    batches = Batches(DATA, numbers, 2)
    state = batches.state_dict()
    for name, value in (("seed", 5), ("together", 4), ("examples", 7)):
        with pytest.raises(ValueError, match=f"state: expected that of {name} = "):
            batches.load_state_dict({**state, name: value})
    with pytest.raises(ValueError, match="state: expected 'position' in it"):
        batches.load_state_dict({"seed": 0})
    with pytest.raises(ValueError, match="state: expected a position of 0 or more, got -3"):
        batches.load_state_dict({**state, "position": -3})
    with pytest.raises(TypeError, match="epochs: expected a number"):
        len(batches)
