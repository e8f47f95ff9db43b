"""Paths as users type them, and folders for what may fail."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def absolute(path: str) -> str:
    """The same place for every working directory; ``~`` stands for the user's own folder."""
    return os.path.abspath(os.path.expanduser(path))


@contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make a folder and those above it that are missing; what is empty of them in the end is gone again.

    Raises:
        OSError: it cannot be made.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        if missing:
            folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for path in missing:
            # Not empty, or never made.
            with suppress(OSError):
                path.rmdir()
