"""The order of training: batch n is a function of a seed and of n."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from llmkern import check
from llmkern.training.objectives.random import ORDER, check_seed, generator

Example = dict[str, Any]
Collator = Callable[[Sequence[Example]], dict[str, Tensor]]


class Batches(IterableDataset[dict[str, Tensor]]):
    """Batches of a dataset in a new order every epoch; iterating goes on where it stopped.

    dataset: a sequence of examples (dicts), any with `len` and `[]`; where it has `draw(index, position)` this is
    called instead, for examples that are random. collator: makes a batch of them; each has got "position", its place in
    the whole run over all epochs, by which collators draw. batch_size: examples of a batch, on each rank. epochs: None
    goes on for ever. shuffle: False keeps the dataset's order. drop_last: leave out what does not fill the last batch
    of the last epoch (batches go across the ends of epochs); needed with several ranks, which then take as many steps.
    rank, world_size: this process among those that share the work; no two get the same example within an epoch.
    num_workers: processes that prepare batches ahead, started in a DataLoader with `loader`, its other arguments (its
    generator is one of its own by default: a loader draws from it, and others' numbers must not know how often); a
    DataLoader around this object (batch_size=None) shares the work among its workers too, but its state is not told.

    Batch n is a function of the arguments and of n alone. `state_dict` counts the batches that were handed out, not
    those that workers prepared. A state may be taken up by another number of ranks where all batches together are as
    large.

    Raises TypeError and ValueError for wrong arguments, by name, as `load_state_dict` does for a state of another seed,
    another size of all ranks' batches together or another number of examples.
    """

    def __init__(
        self,
        dataset: Any,
        collator: Collator,
        batch_size: int,
        *,
        seed: int = 0,
        epochs: int | None = None,
        shuffle: bool = True,
        drop_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        loader: Mapping[str, Any] | None = None,
    ) -> None:
        check_seed(seed)
        for name, value in (("batch_size", batch_size), ("world_size", world_size), ("epochs", epochs or 1)):
            check.positive(name, value)
        for name, value in (("rank", rank), ("num_workers", num_workers)):
            check.integer(name, value)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected one in [0, {world_size}), got {rank}")
        if num_workers < 0:
            raise ValueError(f"num_workers: expected 0 or more, got {num_workers}")
        check.flag("shuffle", shuffle)
        check.flag("drop_last", drop_last)
        if not drop_last and world_size > 1:
            raise ValueError(f"drop_last: expected True with {world_size} ranks, which take as many steps, got False")
        if not len(dataset):
            raise ValueError("dataset: expected one with examples, got none")
        self.dataset, self.collator, self.batch_size, self.seed = dataset, collator, batch_size, seed
        self.epochs, self.shuffle, self.drop_last = epochs, shuffle, drop_last
        self.rank, self.world_size, self.num_workers = rank, world_size, num_workers
        self.loader: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed), **(loader or {})}
        self.position = 0  #: batches handed out
        self._orders: dict[int, np.ndarray] = {}
        if epochs is not None and not len(self):
            raise ValueError(
                f"batch_size: expected at most the {len(dataset) * epochs} examples of {epochs} epochs for all "
                f"{world_size} ranks together, got {batch_size} each"
            )

    def __len__(self) -> int:
        """All batches of this rank, from the first. Raises TypeError where `epochs` is None."""
        if self.epochs is None:
            raise TypeError("epochs: expected a number for a length, got None, which goes on for ever")
        examples, together = len(self.dataset) * self.epochs, self.batch_size * self.world_size
        return examples // together if self.drop_last else -(-examples // together)

    def epoch(self) -> float:
        """How often the whole dataset was handed out by now, to all ranks."""
        return self.position * self.batch_size * self.world_size / len(self.dataset)

    def batch(self, number: int) -> dict[str, Tensor]:
        """Batch `number` of this rank, whatever was drawn before."""
        first = (number * self.world_size + self.rank) * self.batch_size
        last = first + self.batch_size
        if self.epochs is not None:
            last = min(last, len(self.dataset) * self.epochs)
        return self.collator([self._example(position) for position in range(first, last)])

    def _example(self, position: int) -> Example:
        epoch, place = divmod(position, len(self.dataset))
        index = int(self._order(epoch)[place]) if self.shuffle else place
        draw = getattr(self.dataset, "draw", None)
        example = self.dataset[index] if draw is None else draw(index, position)
        if not isinstance(example, Mapping):
            expected = "examples that map names to values (dicts), for the collator"
            raise TypeError(f"dataset: expected {expected}, got {type(example).__name__} at {index}")
        return {**example, "position": position}

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            # A batch may need two; 8 bytes an example each.
            self._orders = {e: o for e, o in self._orders.items() if abs(e - epoch) == 1}
            self._orders[epoch] = generator(self.seed, ORDER, epoch).permutation(len(self.dataset))
        return self._orders[epoch]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        if worker is not None:
            yield from (self.batch(n) for n in self._numbers(self.position + worker.id, worker.num_workers))
            return
        if self.num_workers:
            # The loader takes its workers in turn: batches come in order.
            source: Iterator[dict[str, Tensor]] = iter(
                DataLoader(self, batch_size=None, num_workers=self.num_workers, **self.loader)
            )
        else:
            source = (self.batch(n) for n in self._numbers(self.position, 1))
        for batch in source:
            self.position += 1
            yield batch

    def _numbers(self, first: int, step: int) -> Iterator[int]:
        number = first
        while self.epochs is None or number < len(self):
            yield number
            number += step

    def state_dict(self) -> dict[str, int]:
        """Where the next batch is taken up, and what it depends on."""
        together = self.batch_size * self.world_size
        return {"position": self.position, "seed": self.seed, "together": together, "examples": len(self.dataset)}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        for name, value in self.state_dict().items():
            if name not in state:
                raise ValueError(f"state: expected {name!r} in it, got {sorted(state)}")
            if name != "position" and state[name] != value:
                raise ValueError(f"state: expected that of {name} = {value}, got {state[name]}")
        check.integer("state['position']", state["position"])
        if state["position"] < 0:
            raise ValueError(f"state: expected a position of 0 or more, got {state['position']}")
        self.position = state["position"]
