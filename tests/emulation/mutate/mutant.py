"""A planted fault: one range of one file replaced."""

from __future__ import annotations

import dataclasses
import hashlib


@dataclasses.dataclass(frozen=True)
class Mutant:
    file: str  # relative to the repository's root
    start: int
    end: int
    new: str
    operator: str  # what made it
    function: str
    line: int
    before: str  # the lines that it changes, without white space around
    after: str
    host: bool = False  # in code that runs on the host: the kernels' PTX says nothing about it

    def apply(self, text: str) -> str:
        return text[: self.start] + self.new + text[self.end :]

    def order(self, seed: int) -> str:
        """By which samples are drawn: the same mutants again, also after changes elsewhere in the file."""
        parts = (seed, self.file, self.function, self.operator, self.before, self.after)
        return hashlib.sha256(repr(parts).encode()).hexdigest()


def make(
    file: str, text: str, start: int, end: int, new: str, operator: str, function: str, host: bool = False
) -> Mutant:
    """A mutant with the lines before and after filled in."""
    first, last = text.rfind("\n", 0, start) + 1, text.find("\n", end)
    last = len(text) if last < 0 else last
    lines = [text[first:last], text[first:start] + new + text[end:last]]
    before, after = (" ".join(x.split()) for x in lines)
    return Mutant(file, start, end, new, operator, function, text.count("\n", 0, start) + 1, before, after, host)
