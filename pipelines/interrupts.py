"""Ctrl-C and termination of the driver: the first asks training to stop and save, the second ends it at once."""

import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")

_POLL_S = 0.1
# Whoever signals a process and its group, as `timeout` does, means one signal.
_SAME_S = 0.1
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """While entered, signals that ask the process to end go to `wait`. Outside of that they raise KeyboardInterrupt.

    So every phase can be left in order, whatever the signal: enter it on the main thread, around the Ray session. A
    signal that the process was told to ignore (``nohup``) stays ignored.
    """

    def __init__(self) -> None:
        self._old: dict[int, Any] = {}
        self._waiting = False
        self._asked = False
        self._last_s: float | None = None

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._old[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def wait(self, work: Callable[[], T], ask: Callable[[], bool]) -> T:
        """The result of ``work``, which runs in a thread so that this one can take signals.

        At the first signal ``ask`` is called, here and not in the handler; it asks ``work`` to end, or returns False
        if there is nothing to wait for.

        Raises:
            KeyboardInterrupt: at the second signal, or when ``ask`` returned False; ``work`` goes on in its thread.
        """
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(work())
            except BaseException as error:  # noqa: BLE001  (raised on the main thread)
                done.set_exception(error)

        # Before the work begins, so that no signal finds it begun and nobody waiting.
        self._waiting, asked = True, False
        try:
            threading.Thread(target=run, name="work", daemon=True).start()
            while True:
                try:
                    return done.result(_POLL_S)
                except TimeoutError:
                    if done.done():
                        raise
                if self._asked and not asked:
                    asked = True
                    if not ask():
                        raise KeyboardInterrupt
        finally:
            self._waiting = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._last_s is not None and now - self._last_s < _SAME_S:
            return
        self._last_s = now
        if not self._waiting or self._asked:
            raise KeyboardInterrupt
        self._asked = True
