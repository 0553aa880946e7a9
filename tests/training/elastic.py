"""A run for torchrun, one of whose processes is killed in the middle: tests/training/test_elastic.py."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from llmkern.training import Trainer
from llmkern.training.objectives import Batches
from tests.training import tiny


class Deadly(Batches):
    """Kills this process before batch `at`, the first time that the run is started."""

    at = -1

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in super().__iter__():
            if self.position == self.at and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


def main(folder: str, at: int) -> None:
    """Ten steps, a checkpoint every three; process 1 is killed before batch `at` (-1: never)."""
    torch.set_num_threads(1)
    config = tiny.config(objective="clm", dropout=0.1, max_steps=10, checkpoint_every=3, output_dir=folder)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    data = Deadly(tiny.Sentences("clm"), tiny.collate, 4, epochs=20, rank=rank, world_size=size)
    data.at = at if rank == 1 else -1
    Trainer(None, config, data).train()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
