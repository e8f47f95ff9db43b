"""Progress of work over so many bytes: a bar in a terminal, a line now and then in a log."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

_LINE_EVERY_S = 10.0


class ByteProgress:
    """Shows phases one after the other, each over the same number of bytes."""

    def __init__(self, console: Console, total: int) -> None:
        self._console = console
        self._total = total
        self._phase = ""
        self._last_line = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self._bar = Progress(
            *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
        )
        self._task = self._bar.add_task("", total=total)

    def phase(self, name: str, measured: bool = True) -> None:
        """What is done from now on, and whether its bytes will be told."""
        self._phase = name
        self._bar.reset(self._task, description=name, total=self._total if measured else None)

    def update(self, done: int, total: int) -> None:
        """Bytes done so far."""
        self._bar.update(self._task, completed=done)
        if self._bar.disable and time.monotonic() - self._last_line >= _LINE_EVERY_S:
            self._last_line = time.monotonic()
            self._console.print(f"{self._phase}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB", highlight=False)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()
