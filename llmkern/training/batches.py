"""Where a run stands in its data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from llmkern.training.objectives.batches import Batches


class Counted:
    """Batches of any iterable, with their number as the place to go on from where it keeps none itself.

    One that has state_dict and load_state_dict goes on by these; of another, what was seen is drawn again and dropped.
    passes: how often it is gone through; `Batches` counts epochs itself, and is gone through once.
    """

    def __init__(self, batches: Iterable[Any], passes: int) -> None:
        self.batches, self.epoch, self.position = batches, 0, 0
        self.passes = 1 if isinstance(batches, Batches) else passes
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
