"""The score of a run, as JSON and in words."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from typing import Any

from tests.emulation.mutate import equivalent
from tests.emulation.mutate.judge import Verdict
from tests.emulation.mutate.mutant import Mutant

WANTED = 0.97


@dataclasses.dataclass
class Results:
    verdicts: list[tuple[Mutant, Verdict]]
    not_run: int = 0

    def kind(self, mutant: Mutant, verdict: Verdict) -> str:
        if verdict.kind == "survived" and equivalent.reason(mutant):
            return "equivalent"
        return verdict.kind

    def summary(self) -> dict[str, Any]:
        """planted: those that compile. score: the caught ones' part of those that are not equivalent."""
        counts: Counter[str] = Counter()
        by_file: dict[str, Counter[str]] = defaultdict(Counter)
        survivors, errors = [], []
        for mutant, verdict in self.verdicts:
            kind = self.kind(mutant, verdict)
            counts[kind] += 1
            by_file[mutant.file][kind] += 1
            row = {"file": mutant.file, "line": mutant.line, "before": mutant.before, "after": mutant.after}
            if kind == "survived":
                survivors.append({**row, "reason": verdict.how})
            elif kind == "error":
                errors.append({**row, "reason": verdict.how})
        changing = counts["caught"] + counts["survived"]
        return {
            "planted": changing + counts["equivalent"],
            "caught": counts["caught"],
            "equivalent": counts["equivalent"],
            "survivors": survivors,
            "score": round(counts["caught"] / changing, 4) if changing else None,
            "invalid": counts["invalid"],
            "errors": errors,
            "not_run": self.not_run,
            "files": {file: dict(c) for file, c in sorted(by_file.items())},
        }

    def wrong(self) -> list[str]:
        """Entries of the list of equivalent mutants that a test contradicts."""
        return [
            f"{m.file}:{m.line}: listed as equivalent, and yet {v.how}: {m.before} -> {m.after}"
            for m, v in self.verdicts
            if v.kind == "caught" and equivalent.reason(m)
        ]


def words(summary: dict[str, Any]) -> str:
    lines = [
        f"planted {summary['planted']}, caught {summary['caught']}, equivalent {summary['equivalent']}, "
        f"survivors {len(summary['survivors'])}; {summary['invalid']} did not compile, "
        f"{summary['not_run']} were not run"
    ]
    if summary["score"] is not None:
        lines.append(f"caught of those that change behaviour: {100 * summary['score']:.1f} %")
    for row in summary["survivors"]:
        lines.append(f"  survivor {row['file']}:{row['line']}: {row['before']} -> {row['after']}")
    for row in summary["errors"]:
        lines.append(f"  error {row['file']}:{row['line']}: {row['reason']}")
    return "\n".join(lines)
