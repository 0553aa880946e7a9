"""Verdicts on disk, one a line, so that an interrupted run goes on where it was."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

from tests.emulation.mutate.judge import Verdict, digest
from tests.emulation.mutate.mutant import Mutant
from tests.emulation.mutate.targets import ROOT, Target


class Cache:
    """A verdict counts as long as neither the kernels' sources nor their tests change.

    That PTX is the same, or does not compile, has nothing to do with tests. tests_grew: neither has what was caught,
    where tests were only added to.
    """

    def __init__(self, path: Path, files: dict[str, list[Target]], tests_grew: bool = False):
        self.path, self.tests_grew = path, tests_grew
        self._texts = {f: (ROOT / f).read_text() for f in files}
        self._sources = {f: digest(t, tests=False) for f, t in files.items()}
        self._tests = {f: digest(t, tests=True) for f, t in files.items()}
        self._rows: dict[str, dict] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                    self._rows[row["key"]] = row
                except (json.JSONDecodeError, KeyError, TypeError):  # cut off by an interruption
                    continue

    def key(self, mutant: Mutant) -> str:
        text = mutant.apply(self._texts[mutant.file])
        return hashlib.sha256(f"{self._sources[mutant.file]}\0{mutant.file}\0{text}".encode()).hexdigest()

    def baseline(self, target: Target) -> str:
        text = f"{digest([target], tests=False)}\0{digest([target], tests=True)}\0{target.source}\0no fault"
        return hashlib.sha256(text.encode()).hexdigest()

    def passes(self, target: Target) -> bool:
        """Whether its tests are known to pass without a fault."""
        return self.baseline(target) in self._rows

    def put_passed(self, target: Target) -> None:
        self._put({"key": self.baseline(target)})

    def get(self, mutant: Mutant) -> Verdict | None:
        row = self._rows.get(self.key(mutant))
        if row is None:
            return None
        lasting = ("equivalent", "invalid", "caught") if self.tests_grew else ("equivalent", "invalid")
        if row["tests"] != self._tests[mutant.file] and row["kind"] not in lasting:
            return None
        return Verdict(row["kind"], row["how"], row["seconds"])

    def put(self, mutant: Mutant, verdict: Verdict) -> None:
        self._put({"key": self.key(mutant), "tests": self._tests[mutant.file], **dataclasses.asdict(verdict)})

    def _put(self, row: dict) -> None:
        self._rows[row["key"]] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
