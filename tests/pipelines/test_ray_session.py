import signal
import sys
from types import FrameType

import pytest

from pipelines.interrupts import Interrupts
from pipelines.ray_session import own_sigterm


def _exit(number: int, frame: FrameType | None) -> None:
    """As the handler that ``ray.init`` sets."""
    sys.exit(number)


def test_a_termination_while_ray_starts_is_an_interrupt_like_any_other() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Interrupts():
        own = signal.getsignal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt), own_sigterm():  # noqa: PT012
            signal.signal(signal.SIGTERM, _exit)
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is own
    assert signal.getsignal(signal.SIGTERM) is before


def test_another_exit_while_ray_starts_stays_what_it_is() -> None:
    with Interrupts(), pytest.raises(SystemExit), own_sigterm():
        sys.exit(2)


def test_where_the_process_has_no_handler_of_its_own_that_of_ray_stays() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with own_sigterm():
            signal.signal(signal.SIGTERM, _exit)
        assert signal.getsignal(signal.SIGTERM) is _exit
    finally:
        signal.signal(signal.SIGTERM, before)
