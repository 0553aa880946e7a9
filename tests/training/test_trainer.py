"""A run: the order of the data, checkpoints, and going on from them bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler

import llmkern.training.checkpoints as checkpoints
from llmkern.training import Trainer, build_model
from llmkern.training.batches import Counted
from llmkern.training.metrics import read
from llmkern.training.objectives import Batches
from tests.training import tiny


class Stream:
    """Batches made by a generator of its own, which keep where they stand."""

    def __init__(self):
        self.generator, self.left = torch.Generator().manual_seed(5), 7

    def __iter__(self):
        while self.left:
            self.left -= 1
            first = int(torch.randint(30, (), generator=self.generator))
            yield tiny.batch("mlm", range(first, first + 4))
        self.left = 7

    def state_dict(self):
        return {"generator": self.generator.get_state(), "left": self.left}

    def load_state_dict(self, state):
        self.left = state["left"]
        self.generator.set_state(state["generator"])


class Noisy(tiny.Sentences):
    """Examples that draw from the generator of all, as random crops do."""

    def __getitem__(self, number):
        return super().__getitem__(number) | {"input_ids": torch.randint(tiny.VOCABULARY, (tiny.LENGTH,))}


def loader(data=Noisy, **options):
    # Two steps an epoch: the run is stopped in the middle of the second.
    return DataLoader(data(examples=16), batch_size=4, collate_fn=tiny.collate, **options)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def of_batch_sampler(sampler):
    return DataLoader(
        tiny.Sentences(examples=16), batch_sampler=BatchSampler(sampler, 4, False), collate_fn=tiny.collate
    )


DATA = {
    "loader": lambda: (loader(),),
    "shuffled loader": lambda: (loader(shuffle=True),),
    "shuffled loader with workers": lambda: (loader(tiny.Sentences, shuffle=True, num_workers=1),),
    "loader with a generator": lambda: (loader(shuffle=True, generator=torch.Generator().manual_seed(3)),),
    "loader whose sampler knows the epoch": lambda: (loader(sampler=DistributedSampler(range(16), 1, 0, seed=2)),),
    "loader of a batch sampler": lambda: (of_batch_sampler(RandomSampler(range(16), generator=seeded(4))),),
    "batch sampler whose sampler knows the epoch": lambda: (of_batch_sampler(DistributedSampler(range(16), 1, 0)),),
    "batches with workers": lambda: (Batches(tiny.Sentences(), tiny.collate, 4, epochs=9, num_workers=1),),
    "dataset": lambda: (tiny.Sentences(), tiny.collate),
    "stream with a state": lambda: (Stream(),),
    "list of batches": lambda: ([tiny.batch("mlm", range(i, i + 4)) for i in range(0, 28, 4)],),
}


@pytest.mark.parametrize(
    ("kind", "precision"), [*((kind, "float32") for kind in DATA), ("dataset", "float16"), ("loader", "float16")]
)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(kind, precision, tmp_path):
    """With dropout, accumulation, over an epoch's end; stopped behind, and between, its checkpoints."""

    def run(name, **changes):
        config = tiny.config(
            objective="mlm", dropout=0.1, precision=precision, gradient_accumulation_steps=2, max_steps=9,
            checkpoint_every=3, output_dir=str(tmp_path / name), **changes,
        )  # fmt: skip
        return Trainer(None, config, *DATA[kind]())

    whole = run("whole")
    losses = whole.train()
    assert len(losses) == 9 and [row["loss"] for row in read(tmp_path / "whole")] == losses
    pieces = run("pieces").train(4)
    shutil.rmtree(tmp_path / "pieces/step-4")  # as if it had been killed behind step 4: the last one is of step 3
    torch.manual_seed(77)
    np.random.seed(77)
    second = run("pieces")
    resumed = second.train()
    assert pieces == losses[:4] and resumed == losses[3:]
    assert [row["loss"] for row in read(tmp_path / "pieces")] == losses
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True))
    assert np.random.get_state()[1][0] != 77  # the generators of others too


@pytest.mark.parametrize("batched", [False, True])
def test_a_sampler_has_another_order_in_every_epoch(batched):
    sampler = DistributedSampler(range(16), 1, 0)
    found = Counted(of_batch_sampler(sampler) if batched else loader(tiny.Sentences, sampler=sampler), 3)
    epochs = [torch.cat([b["input_ids"] for b in found]) for _ in range(3)]
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])
    assert torch.equal(*(e.sort(dim=0).values for e in epochs[:2]))  # the same examples


@pytest.mark.parametrize("forgotten", ["generators", "data", "optimizer", "scheduler"])
def test_without_any_part_of_its_state_it_would_not(forgotten, tmp_path, monkeypatch):
    """The faults that the test above is there for."""
    fields = dict(dropout=0.1, max_steps=6, checkpoint_every=3, objective="mlm")
    losses = Trainer(None, tiny.config(**fields), tiny.Sentences(), tiny.collate).train()
    config = tiny.config(output_dir=str(tmp_path), **fields)
    Trainer(None, config, tiny.Sentences(), tiny.collate).train(3)
    trainer = Trainer(None, config, tiny.Sentences(), tiny.collate)
    if forgotten == "generators":
        monkeypatch.setattr("llmkern.training.trainer.set_generators", lambda state: None)
    else:
        monkeypatch.setattr(type(getattr(trainer, forgotten)), "load_state_dict", lambda self, state: None)
    assert trainer.train() != losses[3:]


def test_a_checkpoint_is_whole_or_absent(tmp_path, monkeypatch):
    """Killed at any write, flush or rename, a run finds the last one that was whole."""
    config = tiny.config(output_dir=str(tmp_path), checkpoint_every=2, max_steps=4)
    expected = Trainer(None, config, tiny.Sentences(), tiny.collate).train()[2:]
    shutil.rmtree(tmp_path / "step-4")

    class Killed(BaseException):
        pass

    def dying(name, module, calls):
        original, left = getattr(module, name), [calls]

        def function(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return original(*args, **kwargs)

        return function

    for name, module, calls in (("save", torch, 0), ("save", torch, 1), ("fsync", os, 2), ("rename", os, 0)):
        trainer = Trainer(None, config, tiny.Sentences(), tiny.collate)
        with monkeypatch.context() as patch:
            patch.setattr(module, name, dying(name, module, calls))
            with pytest.raises(Killed):
                trainer.train()
        assert checkpoints.Checkpoints(tmp_path, 3).steps() == [2], name
    assert Trainer(None, config, tiny.Sentences(), tiny.collate).train() == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "step-2", "step-4"]


@pytest.mark.parametrize("changes", [{"max_steps": 50}, {"max_steps": None, "lr_scheduler": "constant"}])
def test_a_checkpoint_is_written_where_the_data_end(changes, tmp_path):
    class Unsized:
        def __iter__(self):
            return iter([tiny.batch()] * 5)

    config = tiny.config(output_dir=str(tmp_path), num_epochs=1, checkpoint_every=4, **changes)
    data = Unsized() if changes["max_steps"] is None else [tiny.batch()] * 5
    assert len(Trainer(None, config, data).train()) == 5
    assert checkpoints.Checkpoints(tmp_path, 3).steps() == [4, 5]
    assert Trainer(None, config, data).train() == []


def test_the_checkpoint_of_another_number_of_processes_is_refused(tmp_path):
    config = tiny.config(output_dir=str(tmp_path), max_steps=2)
    Trainer(None, config, tiny.Sentences(), tiny.collate).train()
    saved = torch.load(tmp_path / "step-2/shared.pt", weights_only=True)
    torch.save(saved | {"processes": 2}, tmp_path / "step-2/shared.pt")
    with pytest.raises(ValueError, match="processes: expected 2 as for the checkpoint of step 2, got 1"):
        Trainer(None, config, tiny.Sentences(), tiny.collate).train()


def test_the_last_few_are_kept(tmp_path):
    config = tiny.config(output_dir=str(tmp_path), checkpoint_every=1, keep_checkpoints=2, max_steps=12)
    Trainer(None, config, tiny.Sentences(), tiny.collate).train()
    assert checkpoints.Checkpoints(tmp_path, 2).steps() == [11, 12]


def test_what_is_in_a_checkpoint_loads_without_pickles_and_without_the_trainer(tmp_path):
    config = tiny.config(output_dir=str(tmp_path), max_steps=2)
    trainer = Trainer(None, config, tiny.Sentences(), tiny.collate)
    trainer.train()
    saved = torch.load(tmp_path / "step-2/shared.pt", weights_only=True)
    model = build_model(type(config).from_dict(saved["config"]))
    model.load_state_dict(saved["model"])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trainer.model.parameters(), strict=True))


def test_the_checkpoint_of_another_run_is_refused(tmp_path):
    config = tiny.config(output_dir=str(tmp_path), max_steps=2)
    Trainer(None, config, tiny.Sentences(), tiny.collate).train()
    fields = config.to_dict()
    with pytest.raises(ValueError, match=r"learning_rate: expected 0.01 as in the checkpoint of step 2, got 0.5"):
        Trainer(None, type(config)(**(fields | {"learning_rate": 0.5})), tiny.Sentences(), tiny.collate).train()
    with pytest.raises(ValueError, match="state: expected that of examples = 50, got 40"):
        Trainer(None, config, tiny.Sentences(examples=50), tiny.collate).train()


def test_batches_of_any_iterable_are_counted():
    batches = Counted([1, 2, 3], 9)
    assert [b for b in batches] == [1, 2, 3] and batches.epoch == 1 and batches.position == 0
    batches.load_state_dict({"epoch": 4, "position": 2, "own": None, "begun": None})
    assert [b for b in batches] == [3] and batches.epoch == 5


def test_metrics_and_board(tmp_path):
    config = tiny.config(output_dir=str(tmp_path), max_steps=3)
    Trainer(None, config, tiny.Sentences(), tiny.collate).train()
    rows = read(tmp_path)
    assert [r["step"] for r in rows] == [1, 2, 3] and all(r["tokens_per_second"] > 0 for r in rows)
    assert rows[0]["learning_rate"] == pytest.approx(0.005) and rows[1]["learning_rate"] == pytest.approx(0.01)
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write(json.dumps(rows[-1])[:20])  # the process was killed within a line
    assert read(tmp_path) == rows
    with pytest.raises(ValueError, match="tensorboard: expected False without an output_dir"):
        Trainer(None, tiny.config(tensorboard=True), tiny.Sentences(), tiny.collate).train()


def test_training_loads_nothing_heavy_and_nothing_loads_training():
    """In a new process: neither transformers nor Triton, and `import llmkern` not this."""
    script = (
        "import sys, llmkern; assert 'llmkern.training' not in sys.modules;"
        "import llmkern.training; llmkern.training.DistillationLoss;"
        "print([m for m in ('transformers', 'triton', 'yaml', 'tensorboard', 'ftfy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_tensorboard_gets_every_step(tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = tiny.config(output_dir=str(tmp_path), tensorboard=True, max_steps=4)
    losses = Trainer(None, config, tiny.Sentences(), tiny.collate).train()
    events = accumulators.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(i + 1, x) for i, x in enumerate(losses)]


def test_bad_arguments_are_refused_by_name():
    with pytest.raises(ValueError, match="tensor_parallel_size: expected a divisor of the 1 processes, got 2"):
        Trainer(None, tiny.config(tensor_parallel_size=2), tiny.Sentences(), tiny.collate)
    with pytest.raises(ValueError, match="precision: expected float32 or bfloat16 with tensor_parallel_size above 1"):
        Trainer(None, tiny.config(tensor_parallel_size=2, precision="float16"), tiny.Sentences(), tiny.collate)
    with pytest.raises(TypeError, match="config: expected a PretrainingConfig, got dict"):
        Trainer(None, {}, tiny.Sentences(), tiny.collate)
    with pytest.raises(ValueError, match="max_steps: expected a number with data without a length and cosine"):
        Trainer(None, tiny.config(max_steps=None), Stream())
    with pytest.raises(TypeError, match="data: expected an iterable of batches without collate, got Sentences"):
        Trainer(None, tiny.config(), tiny.Sentences())
    with pytest.raises(TypeError, match=r"data: expected an iterable that begins again .*, got an iterator, generator"):
        Trainer(None, tiny.config(), (tiny.batch() for _ in range(9)))
    with pytest.raises(ValueError, match="data: expected at least one step's batches in an epoch, got fewer"):
        Trainer(None, tiny.config(gradient_accumulation_steps=3), [tiny.batch()] * 2).train()


class Restarting(Stream):
    """As torchdata's loader: iter begins a new pass, but for one that follows load_state_dict."""

    def __init__(self):
        super().__init__()
        self.loaded = False

    def __iter__(self):
        if not self.loaded:
            self.generator.manual_seed(5)
            self.left = 7
        self.loaded = False
        return super().__iter__()

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.loaded = True


def test_a_run_in_pieces_sees_each_batch_once_of_data_whose_iter_begins_anew(tmp_path):
    config = tiny.config(objective="mlm", max_steps=6)
    whole = Trainer(None, config, Restarting()).train()
    pieces = Trainer(None, config, Restarting())
    assert [*pieces.train(2), *pieces.train(1), *pieces.train()] == whole
    kept = tiny.config(objective="mlm", max_steps=6, output_dir=str(tmp_path))
    assert [*Trainer(None, kept, Restarting()).train(2), *Trainer(None, kept, Restarting()).train()] == whole


def test_waiting_for_data_is_in_the_seconds_of_a_step(tmp_path):
    class Slow(tiny.Sentences):
        def __getitem__(self, number):
            time.sleep(0.02)
            return super().__getitem__(number)

    config = tiny.config(output_dir=str(tmp_path), max_steps=3)
    began = time.perf_counter()
    Trainer(None, config, Slow(), tiny.collate).train()
    assert 3 * config.batch_size * 0.02 <= sum(row["seconds"] for row in read(tmp_path)) <= time.perf_counter() - began


def test_a_damaged_checkpoint_is_named(tmp_path):
    config = tiny.config(output_dir=str(tmp_path), checkpoint_every=2, max_steps=4)
    expected = Trainer(None, config, tiny.Sentences(), tiny.collate).train()
    (tmp_path / "step-9").mkdir()  # none

    def resumed():
        return Trainer(None, config, tiny.Sentences(), tiny.collate).train()

    assert resumed() == []
    shared = tmp_path / "step-4/shared.pt"
    shared.write_bytes(shared.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"output_dir: expected a whole checkpoint, got .*step-4.shared.pt.* damaged"):
        resumed()
    (tmp_path / "step-2/rank-0.pt").rename(tmp_path / "own.pt")
    shutil.rmtree(tmp_path / "step-4")
    with pytest.raises(ValueError, match=r"got one without .*rank-0.pt; without its folder"):
        resumed()
    (tmp_path / "own.pt").rename(tmp_path / "step-2/rank-0.pt")
    assert resumed() == expected[2:]


@pytest.mark.parametrize(("steps", "error"), [(-1, ValueError), (2.5, TypeError), ("a", TypeError), (True, TypeError)])
def test_steps_that_are_no_number_of_them(steps, error):
    with pytest.raises(error, match="steps: expected"):
        Trainer(None, tiny.config(max_steps=2), tiny.Sentences(), tiny.collate).train(steps)
