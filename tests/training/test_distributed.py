"""DDP, FSDP2 and tensor parallelism on 2 and 4 gloo processes: the losses are those of one process, and resume too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import spawn

from llmkern.training import Trainer
from llmkern.training.metrics import read
from tests.training import tiny

GLOBAL_BATCH = 8
WAYS = {
    "DDP": {},
    "DDP, accumulated": {"gradient_accumulation_steps": 2},
    "FSDP2": {"parallelism": "fsdp"},
    "FSDP2, accumulated, checkpointed": {
        "parallelism": "fsdp", "gradient_accumulation_steps": 2, "activation_checkpointing": True,
    },
    "tensor parallel": {"tensor_parallel_size": 2},
}  # fmt: skip
OBJECTIVES = ["mlm_nsp", "clm", "seq2seq"]
CASES = [
    *(("DDP", o) for o in OBJECTIVES), ("DDP, accumulated", "mlm_nsp"), ("FSDP2", "clm"),
    ("FSDP2, accumulated, checkpointed", "mlm_nsp"), ("tensor parallel", "clm"), ("tensor parallel", "seq2seq"),
]  # fmt: skip
STEPS, SAVED = 6, 3
#: By way and objective, of so many steps: float32's own rounding of sums in another order, that grows from step to step.
NEAR = 2e-5


def config(way, objective, world, **changes):
    fields = dict(WAYS[way], objective=objective, max_steps=STEPS, checkpoint_every=SAVED)
    data = world // fields.get("tensor_parallel_size", 1)
    together = data * fields.get("gradient_accumulation_steps", 1)
    return tiny.config(batch_size=GLOBAL_BATCH // together, **(fields | changes))


def data(objective):
    return tiny.Sentences(objective), tiny.collate


def work(rank: int, world: int, folder: str) -> None:
    """One of the processes: every case as a whole, and stopped and gone on."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    found = {}
    for way, objective in CASES:
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
    Path(f"{folder}/{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def found(request, tmp_path_factory):
    """What every process found, and where its files are."""
    folder = tmp_path_factory.mktemp(f"processes-{request.param}")
    spawn(work, (request.param, str(folder)), nprocs=request.param)
    return request.param, folder, [json.loads((folder / f"{r}.json").read_text()) for r in range(request.param)]


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


@pytest.mark.parametrize(("way", "objective"), CASES)
def test_losses_are_those_of_one_process(way, objective, found, alone):
    _, _, runs = found
    losses = [run[f"{way}-{objective}"]["whole"] for run in runs]
    assert all(one == losses[0] for one in losses) and losses[0][-1] < losses[0][0]
    distance = max(abs(a - b) / b for a, b in zip(losses[0], alone[objective], strict=True))
    print(f"{way}, {objective}: {distance:.1e}")
    assert distance < NEAR


@pytest.mark.parametrize(("way", "objective"), CASES)
def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(way, objective, found):
    world, folder, runs = found
    for run in runs:
        one = run[f"{way}-{objective}"]
        assert one["rest"] == one["undisturbed"][SAVED:] and len(one["rest"]) == STEPS - SAVED
    written = [row["loss"] for row in read(folder / f"{way}-{objective}")]
    assert written == runs[0][f"{way}-{objective}"]["undisturbed"]
    sharded = "FSDP2" in way or "tensor" in way
    names = {p.name for p in (folder / f"{way}-{objective}/step-{STEPS}").iterdir()}
    assert names == {"shared.pt", *(f"rank-{r}.pt" for r in range(world))} | ({"sharded"} if sharded else set())
