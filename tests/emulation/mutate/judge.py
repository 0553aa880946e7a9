"""What becomes of a mutant: compiled, compared with the original's PTX, and run through its tests, in a copied tree."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.emulation import cuda_launches
from tests.emulation.mutate import process
from tests.emulation.mutate.mutant import Mutant
from tests.emulation.mutate.targets import ROOT, Changes, Target, headers

Steps = list[tuple[str, bool]]  # as Target.steps has them
FOLDERS = ("csrc", "llmkern", "tests")
#: Of one process of tests: several times what they take, by the processor's clock and by the wall's.
PROCESSOR_S, WALL_S = 120.0, 1200.0


@dataclasses.dataclass(frozen=True)
class Verdict:
    """kind: caught, survived, equivalent (the same PTX), or invalid (it does not compile). how: by which test, why."""

    kind: str
    how: str
    seconds: float


class Tree:
    """A copy of the sources and tests, in which one file at a time is changed."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in FOLDERS:
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        for library in ROOT.glob("llmkern/*.so"):
            (folder / "llmkern" / library.name).symlink_to(library)
        shutil.copy(ROOT / "pyproject.toml", folder)

    @cache  # noqa: B019
    def original(self, target: Target) -> dict[tuple[str, str], str]:
        return self.ptx(target, root=ROOT)

    def ptx(self, target: Target, changes: Changes = (), root: Path | None = None) -> dict[tuple[str, str], str]:
        """By source and architecture, with line information, as the tests compile it. Raises CalledProcessError."""
        source, out, found = (root or self.folder) / target.source, self.folder / "out.ptx", {}
        quoted = f"-iquote,{source.parent}"  # for quoted includes alone: a family's cuda.h is not the toolkit's
        if changes:
            text = changed(source.read_text(), changes)
            source = self.folder / source.name
            source.write_text(text)
        for architecture in target.architectures:
            command = ["nvcc", f"-arch=sm_{architecture}", "-std=c++17", "-O3", "-lineinfo", "-ptx"]
            command += ["-Xcompiler", quoted, str(source), "-o", str(out)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=WALL_S)
            found[target.source, architecture] = out.read_text()
        return found

    @cache  # noqa: B019
    def launchers(self, family: str) -> Path:
        """Where a family's launchers lie, compiled without a fault."""
        folder = self.folder / "launchers" / family
        folder.mkdir(parents=True)
        cuda_launches.compile_in(folder, family)
        return folder

    def baseline(self, target: Target) -> process.Outcome:
        """All tests of the target without a fault."""
        if not _cuda(target):
            return self.passes(target, {}, target.steps(True))
        if target.quick:
            outcome = self.passes(target, self.ptx(target, target.only), [(target.quick, False)])
            if not outcome.passed:
                return outcome
        return self.passes(target, self.original(target), target.steps(True))

    def passes(
        self, target: Target, ptx: dict[tuple[str, str], str], steps: Steps, host_changed: bool = False
    ) -> process.Outcome:
        """These tests of the target, up to the first that fails."""
        seconds, launchers = 0.0, {}
        if target.launchers and not host_changed:
            launchers[target.launchers] = self.launchers(target.launchers)
        for arguments, interpreted in steps:
            outcome = process.pytest_in(self.folder, arguments, interpreted, ptx, launchers, PROCESSOR_S, WALL_S)
            seconds += outcome.seconds
            if not outcome.passed:
                return dataclasses.replace(outcome, seconds=seconds)
        return process.Outcome(True, "", seconds)

    def judge(self, mutant: Mutant, targets: list[Target]) -> Verdict:
        path, started = self.folder / mutant.file, time.monotonic()
        text = path.read_text()
        path.write_text(mutant.apply(text))
        try:
            kind, how = self._judge(mutant, targets)
        except subprocess.CalledProcessError as error:
            kind = "invalid"
            how = next((x for x in error.stderr.splitlines() if "error" in x), "nvcc failed")[-200:]
        except SyntaxError as error:
            kind, how = "invalid", str(error)
        finally:
            path.write_text(text)
        return Verdict(kind, how, round(time.monotonic() - started, 2))

    def _judge(self, mutant: Mutant, targets: list[Target]) -> tuple[str, str]:
        ran: list[str] = []
        for target in targets:
            for ptx, steps in self._parts(mutant, target):
                ran += [arguments for arguments, _ in steps]
                outcome = self.passes(target, ptx, steps, mutant.host)
                if not outcome.passed:
                    return ("error" if outcome.how.startswith("pytest ended") else "caught"), outcome.how
        return ("survived", "all pass: " + "; ".join(ran)) if ran else ("equivalent", "the PTX is the same")

    def _parts(self, mutant: Mutant, target: Target) -> Iterator[tuple[dict[tuple[str, str], str], Steps]]:
        """What is to be run of a target, and with which PTX: its quick test with what that needs first."""
        if not _cuda(target):
            ast.parse((self.folder / mutant.file).read_text())
            yield {}, target.steps(True)
            return
        if target.quick and not mutant.host:
            yield self.ptx(target, target.only), [(target.quick, False)]
        ptx = self.ptx(target)
        differs = any(normal(x) != normal(self.original(target)[which]) for which, x in ptx.items())
        if differs or mutant.host:
            yield ptx, target.steps(differs)


def changed(text: str, changes: Changes) -> str:
    """With each old text, which stands there once, replaced by the new one. Raises ValueError."""
    for old, new in changes:
        if text.count(old) != 1:
            raise ValueError(f"{old!r} stands there {text.count(old)} times, not once")
        text = text.replace(old, new)
    return text


def normal(ptx: str) -> str:
    """PTX without line information and without what nvcc makes of the file's path and contents."""
    ptx = re.sub(r"^\s*(\.section.*\Z)", "", ptx, flags=re.MULTILINE | re.DOTALL)
    ptx = re.sub(r"^(\s*\.(loc|file)\b.*|\$L__tmp\d+:|\$L__func_\w+:|\s*//.*)\n", "", ptx, flags=re.MULTILINE)
    return re.sub(r"_GLOBAL__N__[0-9a-f]+_\d+_\w+?_cu_[0-9a-f]{8}(?:_\d+)?", "_GLOBAL_", ptx)


def _cuda(target: Target) -> bool:
    return target.source.endswith(".cu")


def digest(targets: list[Target], tests: bool) -> str:
    """Of what a verdict depends on but for the mutant: the kernels' sources and launchers, or their tests."""
    hasher = hashlib.sha256(repr([dataclasses.astuple(t) for t in targets] if tests else "").encode())
    for path in sorted(set().union(*((_tests if tests else _sources)(t) for t in targets))):
        hasher.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return hasher.hexdigest()


def _sources(target: Target) -> set[Path]:
    """What is compiled, and the family's Python."""
    family = Path(target.source).parent.name
    found = {ROOT / target.source, *(ROOT / "llmkern" / family).rglob("*.py"), *ROOT.glob(f"csrc/{family}/bindings*.h")}
    return found | ({ROOT / h for h in headers(target.source)} if _cuda(target) else set())


def _tests(target: Target) -> set[Path]:
    """The test files that are named, and all that is no test in the folders of tests: cases, emulators, fixtures."""
    family = Path(target.source).parent.name
    found = {ROOT / word for arguments, _ in target.steps(True) for word in arguments.split() if word.endswith(".py")}
    for folder in ("", family, "emulation", "emulation/ptx", "emulation/cuda", "emulation/launches"):
        found |= {p for p in (ROOT / "tests" / folder).glob("*") if p.is_file() and not p.name.startswith("test_")}
    return found
