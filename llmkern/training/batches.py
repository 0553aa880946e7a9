"""Batches whose order is a function of seed and epoch, and which go on from any place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from llmkern import check


class _Places:
    """The batch sampler of torch's DataLoader: the examples' numbers in each batch, from a batch on."""

    def __init__(self, owner: Batches) -> None:
        self.owner = owner

    def __iter__(self) -> Iterator[list[int]]:
        return self.owner.places(self.owner.position)

    def __len__(self) -> int:
        return len(self.owner)


class Batches:
    """The batches of one process over a dataset with numbered examples, epoch after epoch.

    dataset: has __len__ and __getitem__. batch_size: examples of one process. collate: makes a batch of a list of
    examples; torch's default without one. rank, size: this process among those that see other data; all take the same
    order, drawn anew for each epoch of seed and epoch alone, and share each batch of size * batch_size examples, so
    that N processes see what one with N times the batch sees. What remains for less than that is left out of the epoch.

    Iterating goes on from `position` in `epoch` to the end of it, with any number of workers. Raises ValueError where
    the dataset has less than one batch.
    """

    def __init__(
        self, dataset: Dataset[Any], batch_size: int, collate: Callable[[list[Any]], Any] | None = None, *,
        seed: int = 0, rank: int = 0, size: int = 1, num_workers: int = 0,
    ) -> None:  # fmt: skip
        check.positive("batch_size", batch_size)
        self.examples: int = len(dataset)  # type: ignore[arg-type]
        if self.examples < batch_size * size:
            raise ValueError(f"dataset: expected at least {batch_size * size} examples, got {self.examples}")
        self.batch_size, self.seed, self.rank, self.size = batch_size, seed, rank, size
        self.epoch = self.position = 0
        # A generator of its own: each iteration draws from it, and training's must not know how often that was.
        self.loader: DataLoader[Any] = DataLoader(
            dataset, batch_sampler=_Places(self), collate_fn=collate, num_workers=num_workers,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self.examples // (self.batch_size * self.size)

    def places(self, first: int) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        order = torch.randperm(self.examples, generator=generator)
        for batch in range(first, len(self)):
            begin = (batch * self.size + self.rank) * self.batch_size
            yield order[begin : begin + self.batch_size].tolist()

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            self.position += 1  # before the batch is out: what is saved behind its step goes on with the next
            yield batch
        self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """Where it stands, and the order that this is a place in."""
        return {"epoch": self.epoch, "position": self.position, "seed": self.seed, "examples": self.examples,
                "global_batch": self.batch_size * self.size}  # fmt: skip

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on from there. Raises ValueError for the state of another order."""
        for name, value in self.state_dict().items():
            if name not in ("epoch", "position") and state[name] != value:
                raise ValueError(f"state: expected {name} = {value}, got {state[name]}")
        self.epoch, self.position = state["epoch"], state["position"]


class Counted:
    """Batches of any iterable, with their number as the place to go on from where it keeps none itself.

    One that has state_dict and load_state_dict goes on by these; of another, what was seen is drawn again and dropped.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches, self.epoch, self.position = batches, 0, 0
        self.keeps = hasattr(batches, "state_dict") and hasattr(batches, "load_state_dict")

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        drop = 0 if self.keeps else self.position
        for number, batch in enumerate(self.batches):
            if number >= drop:
                self.position += 1
                yield batch
        self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        own = self.batches.state_dict() if self.keeps else None  # type: ignore[attr-defined]
        return {"epoch": self.epoch, "position": self.position, "own": own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        if self.keeps:
            self.batches.load_state_dict(state["own"])  # type: ignore[attr-defined]
