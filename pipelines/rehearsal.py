"""Outages that are rehearsed: marks in a run's folder, and what those who would meet the outage meet. Imports no torch.

A worker sets them, and others honour them: the driver that delivers to a tracking server, and whoever writes
checkpoints. They raise what the real outage raises, so that what follows is what would follow.
"""

import errno
import os
import time
from pathlib import Path

from pipelines.run_folder import RunFolder, read_json, write_json

_FULL = ".full"


def cut_off(folder: RunFolder, seconds: float) -> None:
    """From now on nothing reaches the tracking server for so long."""
    write_json(folder.cut_off, {"until_ms": round(time.time() * 1000 + seconds * 1000)})


def refuse_if_cut_off(folder: RunFolder) -> None:
    """Raises ConnectionRefusedError while the tracking server is out of reach."""
    try:
        until_ms = read_json(folder.cut_off).get("until_ms", 0)
    except ValueError:
        until_ms = 0
    if time.time() * 1000 < until_ms:
        raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))


def fill_disk(checkpoints: Path) -> None:
    """From now on no checkpoint can be written into this folder."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    (checkpoints / _FULL).touch()


def empty_disk(checkpoints: Path) -> None:
    """From now on checkpoints can be written again."""
    (checkpoints / _FULL).unlink(missing_ok=True)


def refuse_if_full(checkpoints: Path) -> None:
    """Raises OSError (ENOSPC) while no checkpoint can be written into this folder."""
    if (checkpoints / _FULL).exists():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(checkpoints))
