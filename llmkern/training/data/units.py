"""What stands for words where a text is judged, in scripts that put spaces between them and in those that do not."""

from __future__ import annotations

import re

#: Letters of scripts without spaces between words: Thai, Lao, Tibetan, Myanmar, Khmer, kana, Bopomofo, Han.
_LETTERS = (
    "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3041-\u312f\u31a0-\u31bf\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
UNSPACED = re.compile(f"[{_LETTERS}]")
_UNIT = re.compile(rf"[{_LETTERS}]|[^\s{_LETTERS}]+")


def units(text: str) -> list[str]:
    """The words of a text between its spaces; of scripts without spaces every letter."""
    return _UNIT.findall(text)


def is_unspaced(found: list[str]) -> bool:
    """Whether most of the units are letters of scripts without spaces. A word there has about two."""
    return 2 * sum(UNSPACED.match(unit) is not None for unit in found) > len(found)
