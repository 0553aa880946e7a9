"""What stands for words where a text is judged, in scripts that put spaces between them and in those that do not."""

from __future__ import annotations

import re
import unicodedata

#: Letters of scripts without spaces between words: Thai, Lao, Tibetan, Myanmar, Khmer, kana, Bopomofo, Han.
_LETTERS = (
    "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3041-\u312f\u31a0-\u31bf\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
#: What belongs to the letter before it: vowel signs, tones, letters written below another, and punctuation, of which
#: Tibetan puts one behind each syllable; spaces without width too, which Khmer has between words.
_ATTACHED = "".join(
    re.escape(chr(code))
    for block in (range(0x0E00, 0x10A0), range(0x1780, 0x1800), range(0x3099, 0x309B))
    for code in block
    if unicodedata.category(chr(code))[0] in "MP"
)
_ATTACHED += "\u200b-\u200d"
UNSPACED = re.compile(f"[{_LETTERS}]")
_WITHOUT_SENTENCE_MARKS = re.compile("[\u0e00-\u0eff]")  # Thai, Lao: a space ends a sentence, and not only that
_UNIT = re.compile(rf"[{_LETTERS}][{_ATTACHED}]*|[^\s{_LETTERS}]+")


def units(text: str) -> list[str]:
    """The words of a text between its spaces; of scripts without spaces every letter, with the marks that it bears."""
    return _UNIT.findall(text)


def is_unspaced(found: list[str]) -> bool:
    """Whether most of the units are letters of scripts without spaces. A word there has about two."""
    return _are_mostly(UNSPACED, found)


def marks_sentences(found: list[str]) -> bool:
    """Whether the script, of most of the units, has a mark for the end of a sentence."""
    return not _are_mostly(_WITHOUT_SENTENCE_MARKS, found)


def _are_mostly(pattern: re.Pattern[str], found: list[str]) -> bool:
    return 2 * sum(pattern.match(unit) is not None for unit in found) > len(found)
