"""Int8 linear on few rows, the weights read from memory: `python -m benchmarks.int8 --cold`.

A model reads each of its weights once a token, and in no cache is a weight when its turn comes. So each contestant has
copies of its weight and goes to the next one with each call. A sample is one way through them, and the contestants take
turns, always in the same order: until a copy is read again, all others have been, its own contestant's and everybody
else's. There are as many as make up four times the last-level cache together, 256 MB at least and 1.5 GB at most, but
two of each; what that came to is printed.

The share of the memory's rate is the size of the contestant's own weight by its time, over the rate at which this
machine reads a block larger than most caches, measured once a round; where the cache is larger still, that rate may be
more than the memory's.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import int8, isa, peers
from benchmarks.family import OURS, RESULTS, progress, slug
from llmkern.evaluation import machine, roofline
from llmkern.evaluation import timing as harness
from llmkern.evaluation.timing import Result, Spread, markdown
from llmkern.verify.report import Report

SHAPES = [(m, k, n) for k, n in int8.LAYERS for m in (1, 4)]
QUICK = [(1, 768, 768), (1, 4096, 4096)]
LEAST, MOST = 256e6, 1.5e9  #: bytes of all copies of all contestants
#: One that writes into a given tensor reads no less.
WAYS = {name: way for name, way in int8.WAYS.items() if not way.into}
NAME = "int8_cold"


@dataclass
class Kind:
    """A contestant: how one copy of its weight is made, which is called with x, and what a copy takes."""

    copy: Callable[[], Callable[[], Any]]
    bytes: int


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.int8 --cold", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="two shapes, few rounds")
    parser.add_argument("--shapes", nargs="+", default=[], metavar="M,K,N", help="these instead")
    parser.add_argument("--rounds", type=int, help="ways through all copies (default 11, quick 5)")
    parser.add_argument("--most", type=float, default=MOST, metavar="BYTES", help="of all copies (default 1.5e9)")
    parser.add_argument("--isa", choices=isa.choices(), help="force an instruction set on llmkern and on torch")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER", help="default benchmarks/results")
    arguments = parser.parse_args(argv)
    if arguments.isa:
        status = isa.elsewhere(f"benchmarks.{NAME}", sys.argv[1:] if argv is None else argv, arguments.isa)
        if status is not None:
            return status
    for text in arguments.shapes:
        if not re.fullmatch(r"\d+,\d+,\d+", text):
            parser.error(f"--shapes: expected M,K,N, got {text!r}")
    shapes = [tuple(map(int, text.split(","))) for text in arguments.shapes] or (QUICK if arguments.quick else SHAPES)
    rounds = arguments.rounds or (5 if arguments.quick else 11)
    described, cache, block = machine.describe(), last_level_cache(), roofline.MEMORY_BYTES
    print(f"# {NAME}\n\n{machine.line(described)}\n")
    print(f"last-level cache: {f'{cache / 1e6:.0f} MB' if cache else 'its size is not told'}\n")
    content: dict[str, Any] = {}
    wrong: dict[str, str] = {}
    bar = progress(rounds)
    for shape in shapes:
        title = "M={} K={} N={}".format(*shape)
        bar.start(title)
        kinds, report = contestants(shape)
        if not report:
            wrong[title] = str(report)
            print(f"## {title}: WRONG, so not timed\n\n{report}\n")
            continue
        copies = count(kinds, cache, arguments.most)
        result, rates = measure(kinds, copies, rounds, bar.step)
        total = copies * sum(k.bytes for k in kinds.values())
        rate = Spread.of(rates)
        used = f"{copies} copies of each weight, {total / 1e6:.0f} MB in all"
        reading = f"a block of {block / 1e6:.0f} MB is read at {rate.median / 1e9:.1f} GB/s"
        if result.disturbance:
            reading += f"; other processes used {Spread.of(result.disturbance).median:.0%} of the cores"
        print(f"## {title}\n\n{used}; {reading}.\n\n{table(result, kinds, rates)}\n")
        content[title] = {
            **result.to_json(), "copies": copies, "bytes": total, "read_rate": rate._asdict(),
            "bytes_of_a_copy": {name: k.bytes for name, k in kinds.items()},
        }  # fmt: skip
        gc.collect()
    bar.close()
    words = [NAME, slug(described["processor"]), *([arguments.isa] if arguments.isa else [])]
    path = arguments.output / f"{'-'.join(words)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    written = {
        "benchmark": NAME, "machine": described, "isa_forced": arguments.isa, "last_level_cache": cache,
        "rounds": rounds, "wrong": wrong, "cases": content,
    }  # fmt: skip
    path.write_text(json.dumps(written, indent=1) + "\n")
    print(f"written: {path}")
    return 1 if wrong else 0


def last_level_cache() -> int:
    """Bytes of the largest cache that the system tells of; 0 where it tells of none."""
    found = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        size = re.fullmatch(r"(\d+)([KMG])", path.read_text().strip())
        if size:
            found.append(int(size[1]) << {"K": 10, "M": 20, "G": 30}[size[2]])
    return max(found)


def count(kinds: dict[str, Kind], cache: int, most: float = MOST) -> int:
    """How many copies each contestant gets, two at least."""
    wanted = min(most, max(LEAST, 4 * cache)) if cache else most
    return max(2, int(wanted // sum(k.bytes for k in kinds.values())))


def contestants(shape: Sequence[int]) -> tuple[dict[str, Kind], Report]:
    """All of them, and the verdict on ours."""
    m, k, n = shape
    x, linear = int8.layer(shape)
    rows = []
    found: dict[str, Kind] = {}
    for engine in int8.engines(2.0 * m * k * n)[0]:

        def module(engine: str = engine) -> Callable[[], Any]:
            packed = peers.quantized_linear(linear, engine)
            return lambda: packed(x)

        found[int8.quantised(engine)] = Kind(module, k * n)
    half, bias = x.bfloat16(), linear.bias.bfloat16()

    def plain(a: Tensor, b: Tensor) -> Callable[[], Callable[[], Any]]:
        def copy() -> Callable[[], Any]:
            weight = linear.weight.to(a.dtype, copy=True)
            return lambda: F.linear(a, weight, b)

        return copy

    found["torch fp32"] = Kind(plain(x, linear.bias), 4 * k * n)
    found["torch bf16"] = Kind(plain(half, bias), 2 * k * n)
    for name, way in WAYS.items():
        a, weight, scale, b = way.arguments(x, linear.weight, linear.bias)
        rows.append(way.judge(name, way.call(a, weight, scale, b)(), a, weight, scale, b))

        def ours(way: int8.Way = way, args: tuple[Tensor, ...] = (a, weight, scale, b)) -> Callable[[], Any]:
            return way.call(args[0], args[1].clone(), args[2].clone(), args[3])

        found[name] = Kind(ours, weight.nbytes + scale.nbytes)
    return found, Report(tuple(rows))


def measure(
    kinds: dict[str, Kind], copies: int, rounds: int, step: Callable[[], Any] = lambda: None
) -> tuple[Result, list[float]]:
    """Seconds per call, and the rate of reading memory in each round, bytes per second.

    Raises ArithmeticError where a copy of ours gives another result than the first.
    """
    baseline = next(iter(kinds))
    result = Result(baseline, {}, {})
    ways: dict[str, list[Callable[[], Any]]] = {}
    for name, kind in kinds.items():
        try:
            made = [kind.copy() for _ in range(copies)]
            first = made[0]()
            same = all(torch.equal(call(), first) for call in made)  # packs each copy, too
        except Exception as error:  # whatever a peer raises is its result
            result.failed[name] = f"{type(error).__name__}: {error}".split("\n", 1)[0]
            continue
        if not same:
            if name.startswith(OURS):
                raise ArithmeticError(f"{name}: a copy of the weight gives another result than the first one")
            result.failed[name] = "a copy of the weight gives another result than the first one"
            continue
        ways[name], result.samples[name], result.calls[name] = made, [], copies
    rates = []
    for _ in range(rounds):
        before, start = harness.busy(), time.perf_counter()
        for name, calls in ways.items():
            result.samples[name].append(harness.sample(partial(all_of, calls), 1) / copies)
        after, took = harness.busy(), time.perf_counter() - start
        if before and after:
            others = (after[0] - before[0]) - (after[1] - before[1])
            result.disturbance.append(max(0.0, others) / (torch.get_num_threads() * took))
        rates.append(roofline.rate("read", roofline.MEMORY_BYTES))
        step()
    return result, rates


def all_of(calls: Sequence[Callable[[], Any]]) -> None:
    for call in calls:
        call()


def table(result: Result, kinds: dict[str, Kind], rates: list[float]) -> str:
    lines = [["", "time", "20 to 80 %", f"times {result.baseline}", "20 to 80 %", "reads", "of the memory's rate"]]
    for name in result.names:
        t, size = result.time(name), kinds[name].bytes
        share = Spread.of(size / own / rate for own, rate in zip(result.samples[name], rates, strict=True))
        lines.append([*result.cells(name), f"{size / t.median / 1e9:.1f} GB/s", f"{share.median:.0%}"])
    lines += [[name, f"not run: {why}", *[""] * (len(lines[0]) - 2)] for name, why in result.failed.items()]
    return markdown(lines)


if __name__ == "__main__":
    sys.exit(main())
