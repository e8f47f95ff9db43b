import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from pipelines.interrupts import Interrupts

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def _none_ignored() -> Iterator[None]:
    """A test run under ``nohup`` has SIGHUP ignored, and `Interrupts` leaves that alone."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _soon(action: Callable[[], None]) -> None:
    threading.Timer(0.2, action).start()


def _raise(number: int) -> Callable[[], None]:
    return lambda: signal.pthread_kill(threading.main_thread().ident or 0, number)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_asks_the_work_to_end_and_its_result_is_taken(number: int) -> None:
    asked = threading.Event()

    def work() -> str:
        _soon(_raise(number))
        assert asked.wait(60)
        return "saved"

    with Interrupts() as interrupts:
        assert interrupts.wait(work, lambda: asked.set() or True) == "saved"  # type: ignore[func-returns-value]


def test_the_second_signal_ends_the_wait() -> None:
    release = threading.Event()

    def ask() -> bool:
        _soon(_raise(signal.SIGINT))
        return True

    def work() -> None:
        _soon(_raise(signal.SIGTERM))
        release.wait(60)

    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt):
        interrupts.wait(work, ask)
    release.set()


def test_a_signal_that_comes_twice_at_once_is_one() -> None:
    asked = threading.Event()

    def twice() -> None:
        # As `timeout` and service managers do it: to the process, and to its group.
        _raise(signal.SIGTERM)()
        time.sleep(0.02)
        _raise(signal.SIGTERM)()

    def work() -> str:
        _soon(twice)
        assert asked.wait(60)
        time.sleep(0.1)
        return "saved"

    with Interrupts() as interrupts:
        assert interrupts.wait(work, lambda: asked.set() or True) == "saved"  # type: ignore[func-returns-value]


def test_a_signal_in_the_moment_when_the_work_begins_asks_it_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = threading.Event()
    start = threading.Thread.start

    def start_and_signal(thread: threading.Thread) -> None:
        start(thread)
        signal.raise_signal(signal.SIGTERM)

    def ask() -> bool:
        asked.set()
        return True

    with Interrupts() as interrupts:
        monkeypatch.setattr(threading.Thread, "start", start_and_signal)
        try:
            assert interrupts.wait(lambda: asked.wait(60), ask)
        except KeyboardInterrupt:
            pytest.fail("the work had begun, and nobody asked it to end")


def test_with_nothing_to_save_the_first_signal_ends_the_wait() -> None:
    release = threading.Event()

    def work() -> None:
        _soon(_raise(signal.SIGTERM))
        release.wait(60)

    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt):
        interrupts.wait(work, lambda: False)
    release.set()


def test_outside_of_a_wait_every_signal_is_a_keyboard_interrupt_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Interrupts(), pytest.raises(KeyboardInterrupt):  # noqa: PT012
        signal.raise_signal(signal.SIGTERM)
        time.sleep(10)
    assert signal.getsignal(signal.SIGTERM) is before


def test_outside_of_a_wait_a_signal_that_comes_twice_at_once_leaves_the_way_out_alone() -> None:
    with Interrupts():
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            signal.raise_signal(signal.SIGTERM)  # while everything is closed
        else:
            pytest.fail("the signal was lost")


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_error_of_the_work_is_raised_even_if_it_is_a_timeout() -> None:
    def work() -> None:
        raise TimeoutError("the work's own")

    with Interrupts() as interrupts, pytest.raises(TimeoutError, match="the work's own"):
        interrupts.wait(work, lambda: True)
