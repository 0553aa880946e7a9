"""How the processes of a run find each other, also when torchrun has started them again.

torchrun keeps one store for all its attempts. A process group that is made again reads there the addresses of the one
before, whose processes are dead, unless the living ones have written theirs by then (pytorch issue 135712). Its count
of restarts tells attempts apart on one machine, but not on several, where each agent counts by itself. So the first
process names each attempt, and keeps to those who have answered it.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

#: As torch's own for a process group of gloo.
TIMEOUT = timedelta(minutes=30)
_ATTEMPT = "llmkern/attempt"


def join(backend: str, timeout: timedelta = TIMEOUT) -> None:
    """init_process_group with what torchrun has put into the environment. TimeoutError where others do not come."""
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    dist.init_process_group(
        backend, store=attempt(store, rank, size, timeout), rank=rank, world_size=size, timeout=timeout
    )


def attempt(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.Store:
    """A part of the store that this attempt has to itself; returns when all its processes have come.

    The first process writes a new name; every other one answers under it by a name of its own, and has found its
    attempt when the first has listed that one. What an earlier attempt has left is a name whose list lacks it.
    """
    own = uuid.uuid4().hex
    until = time.monotonic() + timeout.total_seconds()
    if rank == 0:
        store.set(_ATTEMPT, own)
        answers = [_answer(own, other) for other in range(1, size)]
        while missing := [key for key in answers if not store.check([key])]:
            _wait(until, f"{len(missing)} of {size} processes have not come")
        store.set(_members(own), ",".join(store.get(key).decode() for key in answers))
        return dist.PrefixStore(own, store)
    while True:
        if store.check([_ATTEMPT]):
            name = store.get(_ATTEMPT).decode()
            store.set(_answer(name, rank), own)
            if store.check([_members(name)]) and own in store.get(_members(name)).decode().split(","):
                return dist.PrefixStore(name, store)
        _wait(until, f"process 0 has not come, or not listed process {rank}: it waits for all")


def _answer(name: str, rank: int) -> str:
    return f"llmkern/{name}/{rank}"


def _members(name: str) -> str:
    return f"llmkern/{name}/members"


def _wait(until: float, reason: str) -> None:
    if time.monotonic() > until:
        raise TimeoutError(f"the processes of this run do not meet: {reason}")
    time.sleep(0.02)
