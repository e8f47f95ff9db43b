"""Who works on a run: locks in its folder that the system takes back when a process ends, however it ends.

There are two. The run lock is held by the command that works on the run. The writer lock is held by the training worker
that writes metrics and checkpoints, that of rank 0. When a command is killed, its workers may live on for a moment:
neither may a successor's worker write beside them, nor may anybody say that the run has ended.
"""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path

from pipelines.errors import UserError
from pipelines.run_folder import RunFolder

_POLL_S = 0.1


class RunBusyError(UserError):
    """Another process works on the run."""


class RunLock:
    """Held from construction to `release`, or to the end of the process.

    Raises:
        RunBusyError: another process holds it.
        UserError: the file system has no locks, or the folder cannot be written to.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._file = _open(folder.lock)
        if not _take(self._file, folder.lock):
            self._file.seek(0)
            holder = self._file.read().strip()
            self._file.close()
            raise RunBusyError(f"run {folder.info.name} is in use by {holder or 'another process'}")
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def release(self) -> None:
        """Let others work on the run."""
        self._file.close()


def is_in_use(folder: RunFolder) -> bool:
    """Whether a command works on the run. Asks without writing: those of other users can be looked at."""
    try:
        with folder.lock.open(encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


@contextmanager
def run_lock(folder: RunFolder) -> Iterator[None]:
    """A `RunLock` for the length of a block."""
    lock = RunLock(folder)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def writer_lock(folder: RunFolder, patience_s: float) -> Iterator[None]:
    """Held by the training worker that writes to the run's folder; waits for one that is still there.

    Raises:
        RunBusyError: it is still there after ``patience_s`` seconds.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience_s
    with _open(folder.writer_lock) as file:
        while not _take(file, folder.writer_lock):
            if time.monotonic() >= deadline:
                raise RunBusyError(f"run {folder.path.name} is still written to by a training worker")
            time.sleep(_POLL_S)
        yield


def is_written_to(folder: RunFolder) -> bool:
    """Whether a training worker is at work on the run."""
    try:
        with writer_lock(folder, patience_s=0.0):
            return False
    except RunBusyError:
        return True


def _open(path: Path) -> TextIOWrapper:
    try:
        return path.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be opened: {error.strerror}") from error


def _take(file: TextIOWrapper, path: Path) -> bool:
    """Lock the file if nobody else holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        file.close()
        raise UserError(f"{path} cannot be locked: {error.strerror}") from error
    return True
