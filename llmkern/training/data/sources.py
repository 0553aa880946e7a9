"""Documents of files, one at a time."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")


def read_documents(paths: Iterable[str | os.PathLike[str]], *, field: str = "text") -> Iterator[str]:
    """The documents of files and of all that lie in folders, in the order of their names.

    A .txt file is one document; a .jsonl file has one in the entry `field` of each line; both may be gzipped. The
    ending alone says which: a.jsonl.txt is text. Bytes that are no UTF-8 become U+FFFD; a byte order mark is no part
    of a document. Held: one document.

    Raises FileNotFoundError, ValueError for another kind of file, and for a line that is no JSON object with a string
    there, by file and line.
    """
    if isinstance(paths, str | os.PathLike):
        raise TypeError(f"paths: expected an iterable of paths, got {paths!r}")
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"paths: expected files or folders, got {str(path)!r}")
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file())
            if not found:
                raise ValueError(f"paths: expected a folder with files of {', '.join(SUFFIXES)}, got {str(path)!r}")
            for file in found:
                yield from _read(file, field)
        else:
            yield from _read(path, field)


def _read(path: Path, field: str) -> Iterator[str]:
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"paths: expected files of {', '.join(SUFFIXES)}, got {str(path)!r}")
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig", errors="replace") as file:
        if not path.name.endswith((".jsonl", ".jsonl.gz")):
            yield file.read()
            return
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[field]
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path}:{number}: expected a JSON object with {field!r}, got {line!r:.80}") from error
            if not isinstance(text, str):
                raise ValueError(f"{path}:{number}: expected a string in {field!r}, got {text!r:.80}")
            yield text
