"""A process that builds a corpus while another does: tests/training/test_corpus.py."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from llmkern.training.objectives import Corpus
from tests.training.small_tokenizers import numbered

#: Of a tokenizer that is not trained: no two processes train one alike.
TEXTS = [" ".join(f"w{i + j}" for j in range(1 + i % 10)) for i in range(600)]


def main(folder: Path, name: str, what: str) -> None:
    """Builds FOLDER/corpus of 600 documents; prints how many it has.

    what: "together" waits in the middle of its documents until the other is there too; "reuse" draws them only when the
    other has begun as well; "killed" dies in the middle of them.
    """
    other = folder / ("b" if name == "a" else "a")

    def stream() -> Iterator[str]:
        (folder / f"{name}-drew").touch()
        for number, text in enumerate(TEXTS):
            if number == 300 and what == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if number == 300 and what == "together":
                (folder / name).touch()
            if number == (300 if what == "together" else 0):
                until = time.monotonic() + 100
                while what != "killed" and not other.exists() and time.monotonic() < until:
                    time.sleep(0.01)
            yield text

    if what == "reuse":
        (folder / name).touch()
    print(len(Corpus.build(stream(), numbered(610), folder=folder / "corpus", reuse=what != "together")))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
