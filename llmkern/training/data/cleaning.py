"""Documents in, documents out: repaired, judged, and each once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from llmkern import check
from llmkern.training.data.duplicates import ExactDuplicates, NearDuplicates
from llmkern.training.data.quality import QualityFilter
from llmkern.training.data.repair import repair

EXACT, NEAR = "exact duplicate", "near duplicate"


@dataclass
class CleaningReport:
    """What became of the documents: read = kept + those dropped for each reason; repaired where more than white space
    changed. Characters are counted as read, and as kept after repair. Printed, it is a table."""

    read: int = 0
    kept: int = 0
    repaired: int = 0
    characters_read: int = 0
    characters_kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        rows = [("read", self.read), ("repaired", self.repaired), ("kept", self.kept)]
        rows += [(f"dropped: {reason}", count) for reason, count in self.dropped.most_common()]
        width = max(len(name) for name, _ in rows)
        share = 100.0 / max(self.read, 1)
        lines = [f"{name:<{width}} {count:>9} {count * share:6.1f} %" for name, count in rows]
        return "\n".join([*lines, f"characters: {self.characters_read} read, {self.characters_kept} kept"])


class Cleaner:
    """Repairs the documents of a stream and passes on those that are good and new.

    repaired: mend characters (`repair`). quality: a filter, or any function that tells why a text is dropped or returns
    None; None passes all. exact, near: what knows which texts were there before; True makes one, False leaves it out.
    Documents are held one at a time; what `exact` and `near` hold of each is theirs to tell. `report` counts over all
    calls, and texts of one call are duplicates of those before, so that several sources can be cleaned one after
    another.

    Raises TypeError for parts that are none, by name.

    >>> cleaner = Cleaner()
    >>> corpus = Corpus.build(cleaner(documents), tokenizer)
    >>> print(cleaner.report)
    """

    def __init__(
        self,
        *,
        repaired: bool = True,
        quality: Callable[[str], str | None] | None = QualityFilter(),  # noqa: B008 (frozen)
        exact: ExactDuplicates | bool = True,
        near: NearDuplicates | bool = True,
    ) -> None:
        check.flag("repaired", repaired)
        if quality is not None and not callable(quality):
            raise TypeError(f"quality: expected a function of a text, or None, got {quality!r}")
        for name, value in (("exact", exact), ("near", near)):
            if not isinstance(value, bool) and not callable(getattr(value, "seen", None)):
                raise TypeError(f"{name}: expected True, False or what has seen(text), got {value!r}")
        self.repaired, self.quality = repaired, quality
        # Asked by identity: one that holds nothing yet is as false as an empty list.
        self.exact = ExactDuplicates() if exact is True else None if exact is False else exact
        self.near = NearDuplicates() if near is True else None if near is False else near
        self.report = CleaningReport()

    def __call__(self, documents: Iterable[str], *, progress: bool = False) -> Iterator[str]:
        """The documents that stay, as they come. progress: show a bar. Raises TypeError for what is no string."""
        if isinstance(documents, str):
            raise TypeError("documents: expected an iterable of documents, got one string")
        if progress:
            from tqdm import tqdm

            documents = tqdm(documents, "cleaning", unit=" documents")
        for document in documents:
            check.text("documents", document)
            self.report.read += 1
            self.report.characters_read += len(document)
            text = repair(document) if self.repaired else document
            self.report.repaired += text.split() != document.split()
            reason = self._reason(text)
            if reason is not None:
                self.report.dropped[reason] += 1
                continue
            self.report.kept += 1
            self.report.characters_kept += len(text)
            yield text

    def _reason(self, text: str) -> str | None:
        if not text.strip():
            return "empty"
        if self.quality is not None and (reason := self.quality(text)) is not None:
            return reason
        if self.exact is not None and self.exact.seen(text):
            return EXACT
        if self.near is not None and self.near.seen(text):
            return NEAR
        return None
