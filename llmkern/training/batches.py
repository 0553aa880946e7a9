"""Where a run stands in its data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from llmkern.training.checkpoints import generators, set_generators
from llmkern.training.objectives.batches import Batches


class Counted:
    """Batches of any iterable, with their number as the place to go on from where it keeps none itself.

    One that has state_dict and load_state_dict goes on by these; of another, what was seen is drawn again and dropped.
    It is drawn with the generators as they were when the epoch began (a DataLoader takes its order and its workers'
    seeds from them), which afterwards stand where they stood: training's random numbers know nothing of it. What orders
    an epoch by its number (DistributedSampler's set_epoch, and those of datasets) is told it.
    passes: how often it is gone through; `Batches` counts epochs itself, and is gone through once.
    """

    def __init__(self, batches: Iterable[Any], passes: int) -> None:
        self.batches, self.epoch, self.position = batches, 0, 0
        self.passes = 1 if isinstance(batches, Batches) else passes
        self.keeps = hasattr(batches, "state_dict") and hasattr(batches, "load_state_dict")
        self.loaded = False  #: its state, and not gone through since
        self.begun: dict[str, Any] | None = None  #: the generators when the epoch began

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        for holder in self._holders():
            if not self.keeps and callable(getattr(holder, "set_epoch", None)):
                holder.set_epoch(self.epoch)
        stood = generators() if self.position else None
        if stood is None:
            self.begun = {"all": generators(), "own": [g.get_state() for g in self._own()]}
        elif not self.keeps and self.begun is not None:
            set_generators(self.begun["all"])
            for generator, state in zip(self._own(), self.begun["own"], strict=True):
                generator.set_state(state)
        if self.keeps and self.position and not self.loaded:  # its iter may begin anew, as that of torchdata's loader
            self.batches.load_state_dict(self.batches.state_dict())  # type: ignore[attr-defined]
        self.loaded = False
        stream = iter(self.batches)
        for _ in range(0 if self.keeps else self.position):
            next(stream, None)
        if stood is not None:
            set_generators(stood)
        for batch in stream:
            self.position += 1
            yield batch
        self.epoch, self.position = self.epoch + 1, 0

    def _holders(self) -> list[Any]:
        """What may have a part in the order of an epoch."""
        found = [self.batches, *(getattr(self.batches, name, None) for name in ("sampler", "batch_sampler", "dataset"))]
        return [*found, getattr(found[2], "sampler", None)]

    def _own(self) -> list[torch.Generator]:
        """The generators that a DataLoader was given."""
        found = [getattr(holder, "generator", None) for holder in self._holders()]
        return [] if self.keeps else [g for g in found if isinstance(g, torch.Generator)]

    def state_dict(self) -> dict[str, Any]:
        own = self.batches.state_dict() if self.keeps else None  # type: ignore[attr-defined]
        return {"epoch": self.epoch, "position": self.position, "own": own, "begun": self.begun}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.position, self.begun = state["epoch"], state["position"], state["begun"]
        if self.keeps:
            self.batches.load_state_dict(state["own"])  # type: ignore[attr-defined]
            self.loaded = True
