"""Documents that were there before: the same, or nearly the same."""

from __future__ import annotations

import hashlib
import unicodedata
from typing import Any

from llmkern import check
from llmkern.training.data.units import is_unspaced, units


def normalized(text: str) -> str:
    """What is compared: NFKC, without case, one space for each run of them."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


class ExactDuplicates:
    """`seen(text)`: whether a text was there before, but for case, white space and compatible characters.

    Held: 16 bytes of a hash for each different text, about 150 bytes with what Python needs for it. Two different texts
    are taken for one with a chance of about n^2 / 2^129 among n.
    """

    def __init__(self) -> None:
        self._held: set[bytes] = set()

    def __len__(self) -> int:
        return len(self._held)

    def seen(self, text: str) -> bool:
        key = hashlib.blake2b(normalized(text).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        before = len(self._held)
        self._held.add(key)
        return len(self._held) == before


class NearDuplicates:
    """`seen(text)`: whether a text shares most of its phrases with one that was kept; else it is kept from now on.

    threshold: of the Jaccard similarity of both texts' phrases, as MinHash estimates it (with a standard deviation of
    at most 1 / (2 sqrt(permutations))). phrase: words of one; twice as many letters in scripts without spaces. Texts
    that might be similar are found by locality-sensitive hashing, set to miss few; the signatures of those found are
    compared, so that different texts are not dropped for one band that happened to agree.

    Held: for each text kept a signature of 4 * permutations bytes and its place in each band's table; docs/data.md has
    the sum measured.

    Raises TypeError and ValueError for wrong arguments, by name, ImportError without datasketch (the extra "training").
    Sources: Broder 1997, "On the resemblance and containment of documents"; Lee et al. 2021, "Deduplicating Training
    Data Makes Language Models Better", section 4.2.
    """

    def __init__(self, threshold: float = 0.8, *, permutations: int = 128, phrase: int = 5, seed: int = 1) -> None:
        check.probability("threshold", threshold)
        check.positive("permutations", permutations)
        check.positive("phrase", phrase)
        check.integer("seed", seed)
        if threshold < 0.1 or permutations < 16:
            raise ValueError(f"threshold, permutations: expected .1 and 16 or more, got {threshold}, {permutations}")
        from datasketch import MinHash, MinHashLSH

        self.threshold, self.phrase = threshold, phrase
        self._empty = MinHash(permutations, seed=seed)
        try:
            self._tables = MinHashLSH(
                threshold, permutations, weights=(0.1, 0.9)
            )  # a miss costs more than a comparison
        except ValueError as error:  # one band of all of them finds next to nothing
            raise ValueError(
                f"threshold: expected one that {permutations} permutations can be split for in bands, got {threshold}; "
                "ask for more permutations or less, or for ExactDuplicates"
            ) from error
        self._signatures: list[Any] = []

    def __len__(self) -> int:
        return len(self._signatures)

    def signature(self, text: str) -> Any:
        """The MinHash of a text's phrases; a text shorter than one is a phrase itself."""
        found = units(normalized(text))
        n = self.phrase * (2 if is_unspaced(found) else 1)
        phrases = {" ".join(found[i : i + n]) for i in range(max(len(found) - n + 1, 1))}
        made = self._empty.copy()
        made.update_batch([phrase.encode("utf-8", "surrogatepass") for phrase in phrases])
        return made

    def seen(self, text: str) -> bool:
        made = self.signature(text)
        values = made.hashvalues.astype("uint32")
        needed = self.threshold * len(values)
        if any((values == self._signatures[i]).sum() >= needed for i in self._tables.query(made)):
            return True
        self._tables.insert(len(self._signatures), made, check_duplication=False)
        self._signatures.append(values)
        return False
