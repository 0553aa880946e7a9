"""The faults written by hand as mutants."""

from __future__ import annotations

from tests.emulation.mutate import faults
from tests.emulation.mutate.mutant import Mutant, make

PLANTED = faults.PLANTED


def mutants(file: str, text: str) -> list[Mutant]:
    """Those of this file. Raises ValueError where one's text is not there exactly once."""
    found = []
    for planted in PLANTED:
        if planted.file == file:
            if text.count(planted.before) != 1:
                times = text.count(planted.before)
                raise ValueError(f"{file}: {planted.before!r} stands there {times} times, not once")
            start = text.index(planted.before)
            end = start + len(planted.before)
            found.append(make(file, text, start, end, planted.after, "planted", "", planted.host))
    return found
