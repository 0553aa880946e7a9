"""Filters by rules that need to know no language."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, fields

from llmkern import check
from llmkern.training.data.units import is_unspaced, marks_sentences, units

_BULLETS = ("-", "*", "•", "‣", "▪", "◦", "●", "·", "\u2013")
_ELLIPSES = ("...", "…", "……")
_SENTENCE_END = re.compile(
    "[.!?\u2026\u3002\uff01\uff1f\uff61\u0964\u0965\u061f\u06d4\u0589\u1362\u104b\u17d4\u17d5\u0f0d\u0f0e]+"
)
_PARAGRAPHS = re.compile(r"\n\s*\n")
#: of Rae et al. 2021, table A1: n-grams and the share of characters that their most frequent one, or all that stand
#: there more than once, may have.
TOP_GRAMS = {2: 0.20, 3: 0.18, 4: 0.16}
REPEATED_GRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


@dataclass(frozen=True)
class QualityFilter:
    """`filter(text)` is why a text is dropped, or None. A limit of None is not looked at.

    Words stand between spaces. In scripts without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese, Tibetan) two
    letters, with the signs that they bear, stand for a word, and rules on the lengths of words are left out.

    min_words, max_words: 50 and 100000 as Gopher. min_mean_word, max_mean_word: letters of a word on average; Gopher
    has 3 to 10 for English, languages differ. max_symbols: share of characters that are no letters, digits, punctuation
    or spaces (symbols, private use, replacement characters). max_hashes: hash signs, and ellipses, for each word
    (Gopher). min_letter_words: share of words with a letter (Gopher). max_bullets, max_ellipses: share of lines that
    begin with a bullet, or end with an ellipsis (Gopher). min_sentences: ends of sentences (C4), not looked at in Thai
    and Lao, which mark none. lorem_ipsum, braces: drop texts with this filler, or with a brace, which are mostly code
    (C4; code is wanted by many, so it is off). max_duplicate_lines, max_duplicate_line_characters, and the same of
    paragraphs: share of those that stood there before (Gopher). repetition: the limits on n-grams of Gopher's table A1,
    which `TOP_GRAMS` and `REPEATED_GRAMS` hold.

    Raises TypeError and ValueError for limits that are none, by name. Sources: Rae et al. 2021, "Scaling Language
    Models: Methods, Analysis & Insights from Training Gopher", appendix A.1; Raffel et al. 2020, "Exploring the Limits
    of Transfer Learning", section 2.2. Their lists of English words are left out.
    """

    min_words: int | None = 50
    max_words: int | None = 100_000
    min_mean_word: float | None = 2.0
    max_mean_word: float | None = 12.0
    max_symbols: float | None = 0.1
    max_hashes: float | None = 0.1
    min_letter_words: float | None = 0.8
    max_bullets: float | None = 0.9
    max_ellipses: float | None = 0.3
    min_sentences: int | None = 3
    lorem_ipsum: bool = True
    braces: bool = False
    max_duplicate_lines: float | None = 0.3
    max_duplicate_line_characters: float | None = 0.2
    max_duplicate_paragraphs: float | None = 0.3
    max_duplicate_paragraph_characters: float | None = 0.2
    repetition: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, bool):
                check.flag(field.name, value)
            elif value is not None:
                check.finite(field.name, value)
                if value < 0:
                    raise ValueError(f"{field.name}: expected 0 or more, or None, got {value}")

    def __call__(self, text: str) -> str | None:
        check.text("text", text)
        found = units(text)
        if not found:
            return "empty"
        unspaced = is_unspaced(found)
        return (
            self._lengths(found, unspaced)
            or self._characters(text, found)
            or self._lines(text)
            or (_repetition(found, 2 if unspaced else 1) if self.repetition else None)
        )

    def _lengths(self, found: list[str], unspaced: bool) -> str | None:
        count = len(found) / 2 if unspaced else len(found)
        if _below(count, self.min_words):
            return "too few words"
        if _above(count, self.max_words):
            return "too many words"
        if unspaced:
            return None
        mean = sum(map(len, found)) / len(found)
        if _below(mean, self.min_mean_word):
            return "words too short"
        if _above(mean, self.max_mean_word):
            return "words too long"
        return None

    def _characters(self, text: str, found: list[str]) -> str | None:
        counts = Counter(text)
        seen = sum(count for character, count in counts.items() if not character.isspace())
        # S: symbols; C: control, private use, surrogates, unassigned. Format characters (Cf) join and direct.
        symbols = sum(count for character, count in counts.items() if _is_symbol(character))
        if _above(symbols / seen, self.max_symbols):
            return "symbols"
        ellipses = text.count("...") + text.count("…")
        if _above(max(counts["#"], ellipses) / len(found), self.max_hashes):
            return "hash signs or ellipses"
        if _below(sum(any(map(str.isalpha, word)) for word in found) / len(found), self.min_letter_words):
            return "words without letters"
        if marks_sentences(found) and _below(len(_SENTENCE_END.findall(text)), self.min_sentences):
            return "too few sentences"
        if self.lorem_ipsum and "lorem ipsum" in text.casefold():
            return "lorem ipsum"
        if self.braces and "{" in text:
            return "braces"
        return None

    def _lines(self, text: str) -> str | None:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if _above(sum(line.startswith(_BULLETS) for line in lines) / len(lines), self.max_bullets):
            return "bullets"
        if _above(sum(line.endswith(_ELLIPSES) for line in lines) / len(lines), self.max_ellipses):
            return "lines that end in ellipses"
        paragraphs = [paragraph.strip() for paragraph in _PARAGRAPHS.split(text) if paragraph.strip()]
        for what, parts, most, most_characters in (
            ("lines", lines, self.max_duplicate_lines, self.max_duplicate_line_characters),
            ("paragraphs", paragraphs, self.max_duplicate_paragraphs, self.max_duplicate_paragraph_characters),
        ):
            share, characters = _duplicates(parts)
            if _above(share, most) or _above(characters, most_characters):
                return f"repeated {what}"
        return None


def _below(value: float, limit: float | None) -> bool:
    return limit is not None and value < limit


def _above(value: float, limit: float | None) -> bool:
    return limit is not None and value > limit


def _is_symbol(character: str) -> bool:
    category = unicodedata.category(character)
    return category[0] == "S" or (category[0] == "C" and category != "Cf" and not character.isspace())


def _duplicates(parts: list[str]) -> tuple[float, float]:
    """The shares of parts, and of their characters, that stood there before."""
    again = [len(part) * (count - 1) for part, count in Counter(parts).items()]
    return 1 - len(again) / len(parts), sum(again) / sum(map(len, parts))


def _repetition(found: list[str], letters: int) -> str | None:
    """letters: units of a word, 2 where each is one letter: n-grams have that many times n units."""
    total = sum(map(len, found))
    for n, limit in TOP_GRAMS.items():
        grams = Counter(zip(*(found[i:] for i in range(n * letters)), strict=False))
        if grams:
            gram, count = grams.most_common(1)[0]
            if count > 1 and count * sum(map(len, gram)) > limit * total:
                return f"one {n}-gram over and over"
    for n, limit in REPEATED_GRAMS.items():
        if _repeated_characters(found, n * letters) > limit * total:
            return f"repeated {n}-grams"
    return None


def _repeated_characters(found: list[str], n: int) -> int:
    """Characters in n-grams that stood there before; none is counted twice."""
    seen: set[tuple[str, ...]] = set()
    characters, at = 0, 0
    while at + n <= len(found):
        gram = tuple(found[at : at + n])
        if gram in seen:
            characters += sum(map(len, gram))
            at += n
        else:
            seen.add(gram)
            at += 1
    return characters
