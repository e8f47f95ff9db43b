"""Folders for work that is not finished, which are swept away when the process that made them is dead."""

import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = ".preparing-"

_OWNER = "owner.lock"
# Made once the lock is held: without it, the owner may be about to take the lock, or done and about to clean up.
_CONTENT = "content"
_UNOWNED_FOR_S = 60.0


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """An empty folder under ``parent`` that is gone afterwards; what shall stay is moved out of it.

    First sweeps those of processes that were killed: the lock on a folder's file ``owner.lock`` dies with its process,
    on whichever machine that was.
    """
    sweep(parent)
    outer = parent / f"{PREFIX}{uuid.uuid4().hex}"
    inner = outer / _CONTENT
    outer.mkdir()
    with (outer / _OWNER).open("xb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            inner.mkdir()
            yield inner
        finally:
            # Still locked: another process would take it for a dead one's and remove it at the same time.
            shutil.rmtree(outer)


def sweep(parent: Path) -> bool:
    """Remove the folders under ``parent`` whose process is dead; whether any of a living one is left."""
    alive = False
    for folder in parent.glob(f"{PREFIX}*"):
        if _is_dead(folder):
            shutil.rmtree(folder, ignore_errors=True)
        else:
            alive = True
    return alive


def _is_dead(folder: Path) -> bool:
    try:
        with (folder / _OWNER).open("r+b") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return (folder / _CONTENT).exists() or _is_old(folder)
    except FileNotFoundError:
        return _is_old(folder)
    except OSError:  # locked, or not ours to open
        return False


def _is_old(folder: Path) -> bool:
    try:
        return time.time() - os.stat(folder).st_mtime > _UNOWNED_FOR_S
    except FileNotFoundError:
        return False
