"""Processes of one attempt find each other, and nobody of an earlier one."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from llmkern.training.joining import attempt

SOON = timedelta(seconds=20)


def meet(store: dist.Store, size: int, first_comes_last: bool) -> list[dist.Store]:
    """The store that each process is given, all of them in threads."""
    found: dict[int, dist.Store] = {}

    def come(rank: int) -> None:
        found[rank] = attempt(store, rank, size, SOON)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(size)]
    for thread in reversed(threads) if first_comes_last else threads:
        thread.start()
        if thread is threads[-1 if first_comes_last else 0]:
            thread.join(0.2)  # the others find what was there before
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(size)]


@pytest.mark.parametrize("first_comes_last", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_attempt_has_names_of_its_own(size, first_comes_last):
    store = dist.HashStore()
    for number in range(3):
        stores = meet(store, size, first_comes_last)
        for other in stores:
            assert not other.check(["address"])  # of the attempt before
        stores[0].set("address", str(number))
        assert all(other.get("address") == str(number).encode() for other in stores)


def test_who_does_not_come_is_told():
    store = dist.HashStore()
    with pytest.raises(TimeoutError, match="1 of 2 processes have not come"):
        attempt(store, 0, 2, timedelta(seconds=0.1))
    with pytest.raises(TimeoutError, match="process 0 has not come, or not listed process 1"):
        attempt(store, 1, 2, timedelta(seconds=0.1))  # only the name that nobody answers any more
