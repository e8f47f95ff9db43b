"""Who works on a run: a lock in its folder that the system takes back when the process ends, however it ends."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper

from pipelines.errors import UserError
from pipelines.run_folder import RunFolder


class RunBusyError(UserError):
    """Another process works on the run."""


class RunLock:
    """Held from construction to `release`, or to the end of the process.

    Raises:
        RunBusyError: another process holds it.
        UserError: the file system has no locks, or the folder cannot be written to.
    """

    def __init__(self, folder: RunFolder) -> None:
        try:
            self._file: TextIOWrapper = folder.lock.open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{folder.lock} cannot be opened: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip()
            self._file.close()
            raise RunBusyError(f"run {folder.info.name} is in use by {holder or 'another process'}") from None
        except OSError as error:
            self._file.close()
            raise UserError(f"{folder.lock} cannot be locked: {error.strerror}") from error
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def release(self) -> None:
        """Let others work on the run."""
        self._file.close()


@contextmanager
def run_lock(folder: RunFolder) -> Iterator[None]:
    """A `RunLock` for the length of a block."""
    lock = RunLock(folder)
    try:
        yield
    finally:
        lock.release()
