"""Checkpoints on the disk: whole or absent, the last few kept, sharded where parameters are.

A checkpoint is the folder step-N: shared.pt is what all processes have in common, rank-R.pt what each has of its own
(generators, the place in the data), and sharded/ parameters and optimiser where no process has all of them
(torch.distributed.checkpoint). It is written under another name, flushed to the disk, and then renamed at once.
"""

from __future__ import annotations

import os
import pickle
import random
import re
import shutil
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

_NAME = re.compile(r"step-(\d+)")
_SHARED = "shared.pt"
_GO_ON = "without its folder a run goes on from the checkpoint before it"


def generators() -> dict[str, Any]:
    """The state of every generator that training may draw from, in types that torch.load takes without pickles."""
    kind, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), place, has_gauss, gauss),
    }


def set_generators(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, place, has_gauss, own = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), place, has_gauss, own))


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def flush(path: Path) -> None:
    """To the disk, a folder's list of names too."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Checkpoints:
    """The checkpoints of a run in a folder that all its processes see. keep: how many of the last stay."""

    def __init__(self, folder: str | os.PathLike[str], keep: int, rank: int = 0) -> None:
        self.folder, self.keep, self.rank = Path(folder), keep, rank
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_shared()

    def _check_shared(self) -> None:
        """Raises now, and not at the first checkpoint, where processes see folders of their own by the same name."""
        if not dist.is_initialized():
            return
        named: list[Any] = [f".seen-{uuid.uuid4().hex}"]
        dist.broadcast_object_list(named, 0)
        mark = self.folder / named[0]
        if self.rank == 0:
            mark.touch()
        barrier()
        seen: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(seen, mark.exists())
        if self.rank == 0:
            mark.unlink()
        if not all(seen):
            raise ValueError(
                f"output_dir: expected a folder that all processes see, got {self.folder}, which "
                f"{seen.count(False)} of {len(seen)} processes have of their own"
            )

    def steps(self) -> list[int]:
        """The steps that have one, in order."""
        found = ((p, _NAME.fullmatch(p.name)) for p in self.folder.iterdir())
        return sorted(int(m[1]) for p, m in found if m and (p / _SHARED).exists())

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step}"

    def last(self) -> int | None:
        """The step of the last one; the first process decides for all, which look at the disk at other moments."""
        found: list[int | None] = [max(self.steps(), default=None)]
        if dist.is_initialized():
            dist.broadcast_object_list(found, 0)
        return found[0]

    def save(self, step: int, shared: dict[str, Any], own: dict[str, Any], sharded: dict[str, Any] | None) -> Path:
        """Called by every process; shared is written by the first alone. Returns the folder."""
        target, partial = self.path(step), self.folder / f".partial-{step}"
        if self.rank == 0:
            for left in self.folder.glob(".partial-*"):  # by a process that was killed
                shutil.rmtree(left)
            partial.mkdir()
            torch.save(shared, partial / _SHARED)
        barrier()
        torch.save(own, partial / f"rank-{self.rank}.pt")
        flush(partial / f"rank-{self.rank}.pt")
        if sharded is not None:
            dcp.save(sharded, checkpoint_id=partial / "sharded")
        barrier()
        if self.rank == 0:
            for path in sorted(partial.rglob("*"), reverse=True):
                flush(path)
            flush(partial)
            self._drop(target)
            os.rename(partial, target)
            flush(self.folder)
            for old in self.steps()[: -self.keep]:
                self._drop(self.path(old))
        barrier()
        return target

    def _drop(self, path: Path) -> None:
        """Renamed first: a folder that is half removed must not look like a checkpoint."""
        if path.exists():
            away = self.folder / f".partial-{path.name}"
            os.rename(path, away)
            shutil.rmtree(away)

    def load(self, step: int) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """What all have in common, and this process's own, None where the run had fewer processes.

        Raises ValueError for a checkpoint that was damaged, naming the file."""
        path = self.path(step)
        own = path / f"rank-{self.rank}.pt"
        shared = _read(path / _SHARED)
        if own.exists() or self.rank >= shared["processes"]:
            return shared, _read(own) if own.exists() else None
        raise ValueError(f"output_dir: expected a whole checkpoint, got one without {own}; {_GO_ON}")

    def load_sharded(self, step: int, into: dict[str, Any]) -> None:
        """Fills the tensors of `into`, whatever number of processes wrote them."""
        dcp.load(into, checkpoint_id=self.path(step) / "sharded")


def _read(path: Path) -> dict[str, Any]:
    try:
        # Without pickles: a checkpoint runs no code of whoever made it.
        found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, KeyError) as error:
        raise ValueError(f"output_dir: expected a whole checkpoint, got {path}, which is damaged; {_GO_ON}") from error
    return found
