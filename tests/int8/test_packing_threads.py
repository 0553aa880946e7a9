"""What is kept of weights and scales is not stale either where several threads call at once."""

from __future__ import annotations

import copy
import sys
import threading

import pytest
import torch

from llmkern import Int8Linear
from llmkern.functional import int8_linear
from llmkern.int8 import reference
from tests.int8.cases import inputs
from tests.int8.test_packing import SCHEMES


@pytest.fixture
def hasty_threads():
    """Threads that take turns at nearly every instruction of Python."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def at_once(calls):
    """What each call returned or raised, all begun together in threads of their own."""
    barrier, found = threading.Barrier(len(calls)), [None] * len(calls)

    def run(i):
        barrier.wait()
        try:
            found[i] = calls[i]()
        except Exception as error:
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("scheme", SCHEMES)
def test_threads_that_call_a_layer_first_at_once(scheme, one_isa, hasty_threads):
    for _ in range(30):
        layer, x = Int8Linear(256, 48, scheme=scheme), torch.randn(3, 256)
        found = at_once([lambda: layer(x)] * 8)  # noqa: B023
        expected = copy.deepcopy(layer)(x)
        assert all(isinstance(y, torch.Tensor) and torch.equal(y, expected) for y in found), found


def test_threads_that_call_after_an_update_at_once(one_isa, hasty_threads):
    """Each finds copies of before, of several layouts, that all want to drop."""
    x, weight, scale, _ = inputs((2, 1024, 8))
    groups = [0, *range(32, 1025, 32)]
    scales = {g: torch.rand(8, -(-1024 // g)) if g else scale for g in groups}

    def call(first, weight):
        return [int8_linear(x, weight, scales[g], inputs="symmetric", group=g) for g in groups[first:]]

    for _ in range(30):
        call(0, weight)
        weight.random_(-127, 128)
        found = at_once([lambda i=i: call(i, weight) for i in range(8)])
        expected = call(0, weight.clone())
        for i, results in enumerate(found):
            assert isinstance(results, list), repr(results)
            assert all(torch.equal(a, b) for a, b in zip(results, expected[i:], strict=True))


def test_threads_with_weights_that_come_and_go(one_isa, hasty_threads):
    x, _, scale, _ = inputs((2, 64, 8))

    def call():
        for _ in range(50):
            weight = torch.randint(-127, 128, (8, 64), dtype=torch.int8)
            if not torch.equal(int8_linear(x, weight, scale), reference.int8_linear(x, weight, scale, None)):
                return weight
        return None

    assert at_once([call] * 6) == [None] * 6
