"""DDP, FSDP2 and tensor parallelism on 2 and 4 gloo processes: the losses are those of one process, and resume too."""

from __future__ import annotations

import json
import shutil
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import spawn

from llmkern.training import DistributedTrainer, NonFiniteLossError, Trainer, build_model
from llmkern.training.metrics import read
from tests.training import tiny

GLOBAL_BATCH = 8
WAYS = {
    "DDP": {},
    "DDP, accumulated, checkpointed": {"gradient_accumulation_steps": 2, "activation_checkpointing": True},
    "FSDP2": {"parallelism": "fsdp"},
    "FSDP2, accumulated, checkpointed": {
        "parallelism": "fsdp", "gradient_accumulation_steps": 2, "activation_checkpointing": True,
    },
    "tensor parallel": {"tensor_parallel_size": 2},
}  # fmt: skip
OBJECTIVES = ["mlm_nsp", "clm", "seq2seq"]
CASES = {
    2: [("DDP", "clm"), ("DDP, accumulated, checkpointed", "mlm_nsp"), ("FSDP2", "clm"),
        ("tensor parallel", "seq2seq")],
    4: [("DDP", "mlm_nsp"), ("FSDP2, accumulated, checkpointed", "mlm_nsp"), ("tensor parallel", "clm")],
}  # fmt: skip
STEPS, SAVED = 6, 3
#: Relative: float32's own rounding of sums in another order, that grows from step to step.
NEAR = 2e-6


def config(way, objective, world, **changes):
    fields = dict(WAYS[way], objective=objective, max_steps=STEPS, checkpoint_every=SAVED)
    data = world // fields.get("tensor_parallel_size", 1)
    together = data * fields.get("gradient_accumulation_steps", 1)
    return tiny.config(batch_size=GLOBAL_BATCH // together, **(fields | changes))


def data(objective):
    return tiny.Sentences(objective), tiny.collate


def skipped(parallelism: str, rank: int, world: int) -> list[float]:
    """Of three steps in float16, in the second of which one process's gradients overflow: how many were skipped, the
    scale, and the last loss."""
    fields = tiny.config(precision="float16", parallelism=parallelism)
    trainer = DistributedTrainer(build_model(fields), fields)
    batch, weighed = tiny.batch("mlm", range(4 * rank, 4 * rank + 4)), trainer._weighed
    trainer.train_step(batch)
    if rank == world - 1:  # the same loss, and gradients that much larger
        trainer._weighed = lambda *args: weighed(*args) + 1e6 * (weighed(*args) - weighed(*args).detach())
    trainer.train_step(batch)
    trainer._weighed = weighed
    loss = trainer.train_step(batch)
    return [trainer.skipped_steps, trainer.scaler.get_scale(), loss]


def work(rank: int, world: int, folder: str) -> None:
    """One of the processes: every case as a whole, and stopped and gone on."""
    torch.set_num_threads(1)
    limit = timedelta(minutes=5)  # one that waits for another which does something else fails, and not after an hour
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=limit
    )  # fmt: skip
    found = {}
    for way, objective in CASES[world]:
        path = Path(folder) / f"{way}-{objective}"
        whole = Trainer(None, config(way, objective, world), *data(objective)).train()
        # With dropout, which has other numbers on every process.
        kept = config(way, objective, world, dropout=0.1, output_dir=str(path))
        undisturbed = Trainer(None, kept, *data(objective)).train()
        if rank == 0:
            shutil.rmtree(path / f"step-{STEPS}")
        dist.barrier()
        rest = Trainer(None, kept, *data(objective)).train()
        found[f"{way}-{objective}"] = {"whole": whole, "undisturbed": undisturbed, "rest": rest}
    found["skipped"] = [skipped(parallelism, rank, world) for parallelism in ("ddp", "fsdp")]
    # The last process has a batch less: all end together, at the same rates, with the same parameters.
    fields = tiny.config(output_dir=f"{folder}/uneven", max_steps=None, num_epochs=2, checkpoint_every=99)
    trainer = Trainer(None, fields, [tiny.batch("mlm", range(i, i + 4)) for i in range(4 - (rank == world - 1))])
    seed = torch.initial_seed()
    steps = len(trainer.train())
    found["uneven"] = [
        trainer.total, steps, trainer.optimizer.param_groups[0]["lr"], trainer.checkpoints.steps(),
        [float(p.detach().double().sum()) for p in trainer.model.parameters()],
    ]  # fmt: skip
    together = tiny.config(tensor_parallel_size=2, objective="seq2seq")
    Trainer(None, together, *data("seq2seq"))
    found["seeds"] = [seed, torch.initial_seed()]
    model = build_model(tiny.config())
    try:
        DistributedTrainer(model, tiny.config(parallelism="fsdp"), torch.optim.SGD(model.parameters()))
    except ValueError as error:
        found["refused"] = str(error)
    # What only the last process's batch brings about stops all of them, before any parameter is changed.
    batch = tiny.batch("mlm", range(4 * rank, 4 * rank + 4))
    trainer = DistributedTrainer(build_model(tiny.config()), tiny.config(output_dir=folder))
    trainer.train_step(batch)
    if rank == world - 1:
        with torch.no_grad():
            trainer.inner.head_bias[0] = torch.nan
    try:
        trainer.train_step(batch)
    except NonFiniteLossError as error:
        kept = torch.load(error.path)["batches"]["0"]
        found["stopped"] = torch.equal(kept["input_ids"], batch["input_ids"])
    Path(f"{folder}/{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """By number of processes: where their files are, and what every one found."""
    results = {}
    for world in CASES:
        folder = tmp_path_factory.mktemp(f"processes-{world}")
        spawn(work, (world, str(folder)), nprocs=world)
        results[world] = folder, [json.loads((folder / f"{r}.json").read_text()) for r in range(world)]
    return results


EACH = pytest.mark.parametrize(
    ("world", "way", "objective"), [(w, *case) for w, cases in CASES.items() for case in cases]
)


@pytest.fixture(scope="module")
def alone():
    """The losses of one process with the whole batch."""
    torch.set_num_threads(1)
    return {
        objective: Trainer(
            None, tiny.config(objective=objective, max_steps=STEPS, batch_size=GLOBAL_BATCH), *data(objective)
        ).train()
        for objective in OBJECTIVES
    }


@EACH
def test_losses_are_those_of_one_process(world, way, objective, found, alone):
    _, runs = found[world]
    losses = [run[f"{way}-{objective}"]["whole"] for run in runs]
    assert all(one == losses[0] for one in losses) and losses[0][-1] < losses[0][0]
    distance = max(abs(a - b) / b for a, b in zip(losses[0], alone[objective], strict=True))
    print(f"{world} processes, {way}, {objective}: {distance:.1e}")
    assert distance < NEAR


@EACH
def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(world, way, objective, found):
    folder, runs = found[world]
    for run in runs:
        one = run[f"{way}-{objective}"]
        assert one["rest"] == one["undisturbed"][SAVED:] and len(one["rest"]) == STEPS - SAVED
    written = [row["loss"] for row in read(folder / f"{way}-{objective}")]
    assert written == runs[0][f"{way}-{objective}"]["undisturbed"]
    sharded = "FSDP2" in way or "tensor" in way
    names = {p.name for p in (folder / f"{way}-{objective}/step-{STEPS}").iterdir()}
    assert names == {"shared.pt", *(f"rank-{r}.pt" for r in range(world))} | ({"sharded"} if sharded else set())


@pytest.mark.parametrize("world", CASES)
def test_processes_with_other_numbers_of_batches_stay_together(world, found):
    _, runs = found[world]
    assert [run["uneven"][:4] for run in runs] == [[6, 6, 0.0, [6]]] * world
    assert all(run["uneven"] == runs[0]["uneven"] for run in runs)


@pytest.mark.parametrize("world", CASES)
def test_processes_draw_other_dropout_but_those_that_share_layers(world, found):
    _, runs = found[world]
    alone, shared = zip(*(run["seeds"] for run in runs), strict=True)
    assert len(set(alone)) == world and len(set(shared)) == world // 2
    assert all(shared[rank] == shared[rank + 1] for rank in range(0, world, 2))


@pytest.mark.parametrize("world", CASES)
def test_an_optimizer_of_whole_parameters_is_refused_where_they_are_sharded(world, found):
    _, runs = found[world]
    words = "optimizer: expected None where parameters are sharded, got one of those before"
    assert [run.get("refused") for run in runs] == [words] * world


@pytest.mark.parametrize("world", CASES)
def test_what_is_not_finite_on_one_process_stops_all(world, found):
    folder, runs = found[world]
    assert [run.get("stopped") for run in runs] == [True] * world
    assert len(list(folder.glob("not-finite-step-1-rank-*.pt"))) == world


@pytest.mark.parametrize("world", CASES)
def test_what_overflows_on_one_process_is_skipped_by_all(world, found):
    _, runs = found[world]
    for ddp, fsdp in (run["skipped"] for run in runs):
        assert ddp[:2] == fsdp[:2] == [1, 32768.0] and ddp[2] == pytest.approx(fsdp[2], rel=1e-5)
    assert all(run["skipped"] == runs[0]["skipped"] for run in runs)
