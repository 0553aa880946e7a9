"""pytest on a copied tree, in a forked process that has torch and numpy already, which saves seconds a mutant."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import resource
import shlex
import signal
import sys
import time
from pathlib import Path
from types import ModuleType


@dataclasses.dataclass(frozen=True)
class Outcome:
    """passed: all tests did. how: the first test that failed, or what ended the process."""

    passed: bool
    how: str
    seconds: float


#: The plugin of unraisable exceptions collects garbage twice, which takes longer than most tests.
PLUGINS = ("no:cacheprovider", "no:hypothesispytest", "no:unraisableexception")
FLAGS = ("-x", "-q", "--tb=no", "-rfE", "--rootdir", ".", *(f"-p{name}" for name in PLUGINS))


def preload() -> None:
    """Imports what tests need and no mutant is part of."""
    import numpy  # noqa: F401
    import pybind11  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import torch._dynamo  # the longest

    torch.set_num_threads(1)


def pytest_in(
    tree: Path, arguments: str, interpreted: bool, ptx: dict[tuple[str, str], str], launchers: dict[str, Path],
    processor_s: float, wall_s: float,
) -> Outcome:  # fmt: skip
    """Runs `pytest -x arguments` in the tree; compilers.nvcc returns what of `ptx` there is already, and
    cuda_launches.build the families that are in the folders of `launchers`, with that PTX.

    A loop without end is told by the processor's time, for the machine may be busy; wall_s ends a process that waits.
    """
    started, log = time.monotonic(), tree / "pytest.log"
    child = os.fork()
    if child == 0:
        _child(tree, log, arguments, interpreted, ptx, launchers, processor_s)
    try:
        status = _wait(child, wall_s)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what it may have left behind, nvcc and the like
    seconds = time.monotonic() - started
    if status == 0:
        return Outcome(True, "", seconds)
    text = log.read_text(errors="replace")
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)(?: - (.*))?", text, re.MULTILINE)
    if status is None or status == -signal.SIGXCPU or status == -signal.SIGKILL:
        return Outcome(False, "no end", seconds)
    if status in (2, 4, 5) or (status > 0 and not failed):  # not a test's failure: collection, usage, nothing selected
        return Outcome(False, f"pytest ended with {status}: {text[-300:].strip()}", seconds)
    if status < 0:
        return Outcome(False, f"crash: {signal.Signals(-status).name}", seconds)
    return Outcome(False, " - ".join(g for g in failed.groups() if g)[:200], seconds)


def _wait(child: int, wall_s: float) -> int | None:
    """The exit code, minus the signal's number for one that a signal ended, None where the time was up."""
    end, pause = time.monotonic() + wall_s, 0.01
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(pause)
        pause = min(2 * pause, 0.2)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _child(
    tree: Path, log: Path, arguments: str, interpreted: bool, ptx: dict[tuple[str, str], str],
    launchers: dict[str, Path], processor_s: float,
) -> None:  # fmt: skip
    code = 3
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1), os.dup2(out, 2)
        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        resource.setrlimit(resource.RLIMIT_CPU, (int(used + processor_s) + 1,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for name in [n for n in sys.modules if n.split(".")[0] in ("tests", "llmkern")]:
            del sys.modules[name]
        os.chdir(tree)
        sys.path[0] = str(tree)
        sys.dont_write_bytecode = True  # two mutants of one size and second look alike to a cache of bytecode
        os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(tree), "TRITON_CACHE_DIR": f"{tree}/triton"}
        if interpreted:  # which Triton finds out when it is imported, and here it is already
            command = [sys.executable, "-m", "pytest", *FLAGS, *shlex.split(arguments)]
            os.execve(sys.executable, command, {**os.environ, "TRITON_INTERPRET": "1"})
        import pytest

        if ptx:
            _use(ptx, launchers, tree)
        code = int(pytest.main([*FLAGS, *shlex.split(arguments)]))
        sys.stdout.flush()
    except BaseException as error:
        with contextlib.suppress(BaseException):
            os.write(2, f"{error!r}\n".encode())
    finally:
        os._exit(code)


def _use(ptx: dict[tuple[str, str], str], launchers: dict[str, Path], tree: Path) -> None:
    from tests.emulation import compilers, cuda_launches

    compiled, built = compilers.nvcc, cuda_launches.build

    def nvcc(source: Path, architecture: str = "80", changes: tuple[tuple[str, str], ...] = ()) -> str:
        found = None if changes else ptx.get((str(source.relative_to(tree)), architecture))
        return found or compiled(source, architecture, changes)

    def build(folder: Path, family: str) -> tuple[ModuleType, list[str]]:
        if family not in launchers:
            return built(folder, family)
        module, whole = cuda_launches.load(launchers[family], family)
        sources = cuda_launches.sources_of(family)
        names = [(str(s.relative_to(tree)), cuda_launches.architecture_of(s)) for s in sources]
        return module, [ptx.get(name, text) for name, text in zip(names, whole, strict=True)]

    compilers.nvcc = nvcc  # type: ignore[assignment]
    cuda_launches.build = build
