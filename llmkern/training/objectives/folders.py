"""Folders that several processes may make at once: each is whole or absent, and one process's alone."""

from __future__ import annotations

import contextlib
import filecmp
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def made_whole(target: Path) -> Iterator[Path]:
    """A folder to write files into, which becomes the target at the end; nothing is left of one that fails.

    Its name, TARGET.part-..., is this process's own. Where another process has made the target meanwhile, that one
    stays. Raises FileExistsError if it holds something else.
    """
    partial = target.with_name(f"{target.name}.part-{uuid.uuid4().hex}")
    partial.mkdir(parents=True)
    try:
        yield partial
        try:
            partial.rename(target)
        except OSError:  # by the system: a folder with something in it, or a file
            if not target.exists():
                raise
            _check_same(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_same(partial: Path, target: Path) -> None:
    names = os.listdir(partial)
    same, _, _ = filecmp.cmpfiles(partial, target, names, shallow=False)
    if len(same) < len(names):
        raise FileExistsError(
            "folder: expected one that does not exist yet or is made of the same documents by the same tokenizer, got "
            f"{str(target)!r}, which another process has made of others meanwhile"
        )


@contextlib.contextmanager
def in_turn(target: Path) -> Iterator[None]:
    """One process at a time, of all that name the same target: the others wait, and then find what the first has made.

    By a lock on TARGET.lock, which the system takes from a process that dies: the next one goes on. It needs no process
    group. Where the file system has no locks no one waits, and each makes the target (`made_whole`).
    """
    path = target.with_name(target.name + ".lock")
    if target.exists():
        yield
        return
    import fcntl  # not on Windows

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        # No locks here, or on another machine the file was taken away while this one waited: nothing is lost.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
            path.unlink(missing_ok=True)  # no one needs to wait any more
        finally:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)  # closing alone would leave it to processes forked meanwhile
