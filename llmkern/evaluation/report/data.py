"""The data of a report: a file of text, or lines of JSON."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

#: The fields of a line of JSON, by what the lines are.
FIELDS = {"texts": {"text"}, "pairs": {"prompt", "reference"}, "labels": {"text", "label"}}
EXPECTED = "data: expected a file of text (UTF-8) or of lines of JSON"
FIELDS_EXPECTED = '{"text"}, {"prompt", "reference"} or {"text", "label"}'


@dataclass(frozen=True)
class Data:
    """What a file holds. format: "text" (one text), "texts", "pairs" or "labels"; records: by their fields, of a file
    of text its only one, {"text"}. cut: how many texts were shortened to what a model takes."""

    file: str
    sha256: str
    format: str
    records: tuple[dict[str, Any], ...]
    cut: int = 0

    def column(self, field: str) -> list[Any]:
        return [record[field] for record in self.records]

    def lines(self) -> Data:
        """A file of text as texts, one a line, for models that take sentences and not books."""
        if self.format != "text":
            return self
        rows = tuple({"text": line} for line in self.records[0]["text"].splitlines() if line.strip())
        return replace(self, format="texts", records=rows)

    def used(self, tokenizer: Any, tokens: int, limit: int | None = None) -> Data:
        """The first records, of about `tokens` tokens by their first field, and at least one.

        A text of a file of text ends, and so does one longer than `limit` tokens, where `fitting` ends it.
        """
        field = "prompt" if self.format == "pairs" else "text"
        if self.format == "text":
            text = self.records[0][field]
            return replace(self, records=({field: fitting(tokenizer, text, tokens)},))
        kept: list[dict[str, Any]] = []
        cut, left = 0, tokens
        for record in self.records:
            text = record[field]
            if limit is not None:
                text = fitting(tokenizer, text, limit)
                cut += text != record[field]
            left -= count(tokenizer, text)
            if kept and left < 0:
                break
            kept.append({**record, field: text})
        return replace(self, records=tuple(kept), cut=cut)


def count(tokenizer: Any, text: str) -> int:
    """The tokens of a text, the tokenizer's special ones included."""
    return len(tokenizer(text, verbose=False)["input_ids"])


#: The longest word, in characters, that is left out whole; texts without spaces have none so short.
WORD = 24


def fitting(tokenizer: Any, text: str, tokens: int) -> str:
    """The beginning of the text that is at most so many tokens, and all of it where it is short enough. It ends behind
    a word where words are written apart, else behind a character with its marks."""
    # A word of a normal text has more than one character; whoever has others is cut where this ends.
    near = text[: 64 * tokens]
    if count(tokenizer, near) <= tokens:
        return near
    low, high = 0, len(near) - 1  # near[:low] fits
    while low < high:
        middle = (low + high + 1) // 2
        if count(tokenizer, near[:middle]) <= tokens:
            low = middle
        else:
            high = middle - 1
    while low and unicodedata.category(near[low]).startswith("M"):
        low -= 1
    if not near[low].isspace():
        spaces = [i for i in range(max(0, low - WORD), low) if near[i].isspace()]
        low = spaces[-1] if spaces else low
    kept = near[:low].rstrip()
    while kept and count(tokenizer, kept) > tokens:  # a shorter text can have more tokens
        kept = kept[:-1]
    return kept or near[:1]


def read_data(path: str | Path) -> Data:
    """The data of a file: .jsonl or .ndjson (and whatever else begins with an object of JSON), lines of JSON, all with
    the fields {"text"}, {"prompt", "reference"} (a text or a list of texts) or {"text", "label"} (a class's number or
    name); .json, the same or one list of such objects; else a file of text.

    Raises ValueError that names the file, and the line, where it is none of these, or empty.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        content = raw.decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{EXPECTED}, got {str(path)!r}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ValueError(f"{EXPECTED}, got {str(path)!r}, whose line {line} is not UTF-8") from error
    if not content.strip():
        raise ValueError(f"{EXPECTED}, got {str(path)!r}, which is empty")
    if "\0" in content:
        raise ValueError(f"{EXPECTED}, got {str(path)!r}, which holds bytes of 0")
    digest = hashlib.sha256(raw).hexdigest()
    suffix = path.suffix.lower()
    listed = _list(content) if suffix == ".json" else None
    if suffix not in (".json", ".jsonl", ".ndjson") and not _is_object(content):
        return Data(str(path), digest, "text", ({"text": content},))
    if listed is not None:
        records, format = _records(str(path), [(f"record {i}", one) for i, one in enumerate(listed, 1)])
    else:
        records, format = _records(str(path), _lines(str(path), content.split("\n")))
    return Data(str(path), digest, format, tuple(records))


def _is_object(content: str) -> bool:
    try:
        return isinstance(json.loads(content.lstrip().split("\n", 1)[0]), dict)
    except (ValueError, RecursionError):
        return False


def _list(content: str) -> list[Any] | None:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list) and found else None


def _lines(path: str, lines: Sequence[str]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except (ValueError, RecursionError) as error:
            where = f"data: {path}, line {number}: expected"
            raise ValueError(f"{where} an object of JSON, got {_short(line)}: {error}") from error


def _records(path: str, found: Iterable[tuple[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """found: each with the place where it stands."""
    records: list[dict[str, Any]] = []
    format = ""
    for place, record in found:
        where = f"data: {path}, {place}: expected"
        if not isinstance(record, dict):
            raise ValueError(f"{where} an object of JSON, got {_short(json.dumps(record))}")
        kind = next((kind for kind, fields in FIELDS.items() if fields == set(record)), None)
        if kind is None:
            raise ValueError(f"{where} the fields {FIELDS_EXPECTED}, got {', '.join(map(repr, record)) or 'none'}")
        if format and kind != format:
            raise ValueError(f"{where} the fields of the lines before, {', '.join(sorted(FIELDS[format]))}, got others")
        format = kind
        for field, value in record.items():
            if not _fits(field, value):
                raise ValueError(f"{where} {_WANTED[field]} for {field!r}, got {_short(json.dumps(value))}")
            if re.search("[\ud800-\udfff]", json.dumps(value, ensure_ascii=False)):
                raise ValueError(f"{where} characters for {field!r}, got {_short(json.dumps(value))}, half of one")
        records.append(record)
    return records, format


_WANTED = {
    "text": "a text", "prompt": "a text", "reference": "a text or a list of texts", "label": "a number or a name",
}  # fmt: skip


def _fits(field: str, value: Any) -> bool:
    if field == "label":
        return isinstance(value, (int, str)) and not isinstance(value, bool)
    if field == "reference" and isinstance(value, list):
        return bool(value) and all(isinstance(v, str) for v in value)
    return isinstance(value, str) and bool(value.strip())


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
