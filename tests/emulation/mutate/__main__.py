"""python -m tests.emulation.mutate: plants faults in the GPU kernels and tells which of them the tests catch."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import multiprocessing.pool
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.emulation.mutate import cuda_source, equivalent, planted, process, triton_source
from tests.emulation.mutate.cache import Cache
from tests.emulation.mutate.judge import Tree, Verdict
from tests.emulation.mutate.mutant import Mutant
from tests.emulation.mutate.report import WANTED, Results, words
from tests.emulation.mutate.targets import ROOT, Target, files

CACHE = ROOT / "build/mutation/verdicts.jsonl"


def collect(chosen: dict[str, list[Target]]) -> list[Mutant]:
    """All mutants of these files, no two of them the same text."""
    found: dict[tuple[str, str], Mutant] = {}
    names = dict.fromkeys([*chosen, *(p.file for p in planted.PLANTED if p.file in chosen)])
    for file in names:
        text = (ROOT / file).read_text()
        make = triton_source if file.endswith(".py") else cuda_source
        for mutant in (*planted.mutants(file, text), *make.mutants(file, text)):
            found.setdefault((file, mutant.apply(text)), mutant)
    return list(found.values())


def draw(mutants: list[Mutant], sample: int, seed: int) -> list[Mutant]:
    """`sample` of them (0: every one), half of which are written by hand, or as many as there are; a smaller sample is
    part of a larger one."""
    in_order = sorted(mutants, key=lambda m: m.order(seed))
    by_hand, others = ([m for m in in_order if (m.operator == "planted") == hand] for hand in (True, False))
    if not sample:
        return by_hand + others
    return (
        by_hand[: max(sample // 2, sample - len(others))] + others[: max(sample - sample // 2, sample - len(by_hand))]
    )


_tree: Tree


def _start(folder: str) -> None:
    global _tree
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *args: sys.exit(1))
    mine = Path(folder) / str(os.getpid())
    mine.mkdir()
    _tree = Tree(mine)


def _judge(job: tuple[int, Mutant, list[Target]]) -> tuple[int, Verdict]:
    return job[0], _tree.judge(job[1], job[2])


def _baseline(target: Target) -> tuple[Target, process.Outcome]:
    return target, _tree.baseline(target)


def run(
    mutants: list[Mutant], chosen: dict[str, list[Target]], processes: int, cache: Cache, minutes: float | None = None
) -> Results:
    """The verdict on each, put into the cache one by one; on as many as `minutes` are enough for.

    Raises SystemExit where the tests fail without a fault.
    """
    end = time.monotonic() + 60 * (minutes or 1e6)
    verdicts = {m: v for m in mutants if (v := cache.get(m)) is not None}
    waiting = sorted((m for m in mutants if m not in verdicts), key=lambda m: m.order(0))  # of all kinds from the start
    print(f"{len(mutants)} mutants, {len(verdicts)} verdicts known from before", flush=True)
    if waiting:
        process.preload()
        with tempfile.TemporaryDirectory() as folder:
            signal.signal(signal.SIGTERM, lambda *args: sys.exit(1))  # and end the processes below
            pool = multiprocessing.get_context("fork").Pool(processes, _start, (folder,))
            try:
                _check_baseline(pool, list(dict.fromkeys(t for m in waiting for t in chosen[m.file])), cache)
                started, jobs = time.monotonic(), [(i, m, chosen[m.file]) for i, m in enumerate(waiting)]
                for done, (i, verdict) in enumerate(pool.imap_unordered(_judge, jobs), 1):
                    mutant, verdicts[waiting[i]] = waiting[i], verdict
                    if verdict.kind != "error":
                        cache.put(mutant, verdict)
                    left = (time.monotonic() - started) / done * (len(waiting) - done)
                    print(
                        f"[{done}/{len(waiting)}, {left / 60:.0f} min left] {mutant.file}:{mutant.line}: "
                        f"{mutant.before[:90]} -> {mutant.after[:90]}: {verdict.kind}, {verdict.how[:120]} "
                        f"({verdict.seconds:.0f} s)",
                        flush=True,
                    )
                    if time.monotonic() > end:
                        break
            finally:
                pool.terminate()
                pool.join()
    return Results([(m, verdicts[m]) for m in mutants if m in verdicts], sum(m not in verdicts for m in mutants))


def _check_baseline(pool: multiprocessing.pool.Pool, targets: list[Target], cache: Cache) -> None:
    for target, outcome in pool.imap_unordered(_baseline, [t for t in targets if not cache.passes(t)]):
        if not outcome.passed:
            raise SystemExit(f"{target.source}: the tests fail without any fault: {outcome.how}")
        cache.put_passed(target)
        print(f"{target.source}: the tests pass without a fault, in {outcome.seconds:.0f} s", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.emulation.mutate", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--kernel", help="of device functions whose name contains this alone")
    parser.add_argument("--file", action="append", help="of files whose path contains this alone, or another --file's")
    parser.add_argument("--sample", type=int, default=300, metavar="N", help="N mutants (0: all; default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at once")
    parser.add_argument("--minutes", type=float, help="then report on the mutants that were run until then")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    parser.add_argument("--cache", type=Path, default=CACHE, help="verdicts that are known (default %(default)s)")
    parser.add_argument(
        "--tests-grew", action="store_true", help="since the last run tests were only added: what they caught stays so"
    )
    options = parser.parse_args(arguments)
    for name, least in (("sample", 0), ("jobs", 1), ("minutes", 0)):
        given = getattr(options, name)
        if given is not None and given < least:
            parser.error(f"--{name}: expected a number from {least} on, got {given}")

    known = files()
    for part in options.file or ():
        if not any(part in f for f in known):
            parser.error(f"--file: no path contains {part!r}; there are {', '.join(known)}")
    chosen = {f: t for f, t in known.items() if options.file is None or any(part in f for part in options.file)}
    everything = collect(chosen)
    functions = sorted({m.function for m in everything} - {""})
    if options.kernel is not None and not any(options.kernel in name for name in functions):
        parser.error(
            f"--kernel: no device function's name contains {options.kernel!r}; there are {', '.join(functions)}"
        )
    stale = equivalent.stale(everything)
    for entry in stale:
        print(f"{entry.file}: no mutant is {entry.before!r} -> {entry.after!r}, listed as equivalent", file=sys.stderr)
    mutants = draw([m for m in everything if (options.kernel or "") in m.function], options.sample, options.seed)
    if options.list:
        for m in mutants:
            print(f"{m.file}:{m.line}: {m.operator} in {m.function or 'the file'}: {m.before} -> {m.after}")
        print(f"{len(mutants)} mutants")
        return bool(stale)
    if any(f.endswith((".cu", ".cuh", ".h")) for f in chosen) and shutil.which("nvcc") is None:
        raise SystemExit("there is no nvcc on PATH to compile the mutants of CUDA C++; --file triton leaves them out")

    cache = Cache(options.cache, chosen, options.tests_grew)
    results = run(mutants, chosen, options.jobs, cache, options.minutes)
    summary = results.summary()
    print(words(summary))
    for line in results.wrong():
        print(line, file=sys.stderr)
    if options.json:
        options.json.write_text(json.dumps(summary, indent=2) + "\n")
    good = summary["score"] is None or summary["score"] >= WANTED
    return int(bool(stale or results.wrong() or summary["errors"]) or not good)


if __name__ == "__main__":
    sys.exit(main())
