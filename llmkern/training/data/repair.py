"""Text as its writer meant it: wrong decodings undone, one form for each character."""

from __future__ import annotations

import re

from llmkern import check

_BLANK_LINES = re.compile(r"\n{3,}")
#: Invisible and without meaning within a text: soft hyphens, characters that are none. Joiners (ZWJ, ZWNJ) and the
#: marks of direction have a meaning.
_NOTHING = re.compile("[\u00ad\ufdd0-\ufdef\ufffe\uffff]")


def repair(text: str) -> str:
    """The text repaired by ftfy: wrong decodings (mojibake), HTML entities where there is no HTML, surrogates, control
    characters, line ends, ligatures, and all of it in NFC; soft hyphens, white space before line ends and more than one
    blank line are taken away.

    Quotation marks stay as typed, and so does the width of characters: wide punctuation is right in Chinese.

    Raises TypeError for what is no string, ImportError without ftfy (the extra "training").
    Source: Speer 2019, "ftfy", doi 10.5281/zenodo.2591652.
    """
    check.text("text", text)
    from ftfy import TextFixerConfig, fix_text

    config = TextFixerConfig(uncurl_quotes=False, fix_character_width=False, explain=False)
    fixed = _NOTHING.sub("", fix_text(text, config))
    # Not by a regular expression for white space before a line's end: each place in a run of it would look for that
    # end, which takes hours in a megabyte of spaces.
    lines = "\n".join(line.rstrip() for line in fixed.split("\n"))
    return _BLANK_LINES.sub("\n\n", lines).strip()
