"""A job's output as it comes, what Ctrl-C does meanwhile, and the exit code in the end."""

import asyncio
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from pipelines.command_line import EXIT_DEFECT, EXIT_DONE, EXIT_INTERRUPTED
from pipelines.errors import UserError
from pipelines.job import exit_code_in

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

# A dashboard that restarts or a network that drops is back within this time, or the watch ends.
_LOST_AFTER_S = 120
_RETRY_S = 1.0
_POLL_S = 0.1
# The exit code stands in one of the last lines: Ray's own words on the end of a driver may follow it.
_TAIL_CHARACTERS = 4_000


class _Output:
    """Prints a job's log once, however often it is read from its beginning."""

    def __init__(self) -> None:
        self.tail = ""
        # Held while the user is asked: what comes meanwhile is printed afterwards.
        self.lock = threading.Lock()
        self._printed = 0
        self._skip = 0

    def restart(self) -> None:
        """The log comes from its beginning again."""
        self._skip = self._printed

    def add(self, text: str) -> None:
        """Take up the next part of the log."""
        with self.lock:
            skipped = min(self._skip, len(text))
            self._skip -= skipped
            new = text[skipped:]
            self._printed += len(new)
            self.tail = (self.tail + new)[-_TAIL_CHARACTERS:]
            with suppress(BrokenPipeError):
                print(new, end="", flush=True)


class _Follower(threading.Thread):
    """Reads a job's log to its end, through dropped connections; in a thread, so that no Ctrl-C can tear it."""

    def __init__(self, client: "JobSubmissionClient", job_id: str) -> None:
        super().__init__(name="job-log", daemon=True)
        self.output = _Output()
        self._client = client
        self._job_id = job_id
        self._code: int | None = None
        self._error: BaseException | None = None

    def result(self) -> int:
        """The exit code, once the thread is over. Raises what ended it."""
        if self._error is not None:
            raise self._error
        assert self._code is not None
        return self._code

    def run(self) -> None:
        try:
            self._code = self._follow()
        except BaseException as error:  # noqa: BLE001 - raised by `result` in the thread that waits
            self._error = error

    def _follow(self) -> int:
        lost_since: float | None = None
        while True:
            try:
                _info(self._client, self._job_id)
                lost_since = None
                self.output.restart()
                asyncio.run(self._read())
                info = _info(self._client, self._job_id)
                if info.status.is_terminal():
                    return _exit_code(info, self.output.tail)
            except _connection_errors() as error:
                lost_since = lost_since or time.monotonic()
                if time.monotonic() - lost_since > _LOST_AFTER_S:
                    _tell(
                        f"error: no connection to the head for {_LOST_AFTER_S} s ({error}); the job may run on: "
                        f"steadymoe submit --watch {self._job_id}"
                    )
                    return EXIT_DEFECT
            time.sleep(_RETRY_S)

    async def _read(self) -> None:
        async for text in self._client.tail_job_logs(self._job_id):
            self.output.add(text)


def watch(client: "JobSubmissionClient", job_id: str) -> int:
    """Show a job's log until the job ends; returns the exit code of its command.

    Raises:
        UserError: the head knows no such job.
    """
    follower = _Follower(client, job_id)
    stopping = False
    with _interrupts() as interrupted:
        follower.start()
        while follower.is_alive():
            follower.join(_POLL_S)
            if not interrupted.is_set():
                continue
            interrupted.clear()
            if stopping:
                _tell(f"\nThe job goes on saving; see it with: steadymoe submit --watch {job_id}")
                return EXIT_INTERRUPTED
            with follower.output.lock:
                answer = _ask()
            if answer == "detach":
                _tell(f"The job runs on; see it with: steadymoe submit --watch {job_id}")
                return EXIT_DONE
            if answer == "stop":
                stopping = _stop(client, job_id)
            else:
                _tell("watching on")
    return follower.result()


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Ctrl-C sets an event instead of raising wherever the program happens to be."""
    pressed = threading.Event()
    old = signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, old)


def _info(client: "JobSubmissionClient", job_id: str) -> "JobDetails":
    try:
        return client.get_job_info(job_id)
    except RuntimeError as error:
        if "404" in str(error):
            raise UserError(f"{job_id}: the Ray head knows no such job; steadymoe status lists them") from None
        raise


def _exit_code(info: "JobDetails", tail: str) -> int:
    """The exit code of the job's command, which Ray does not keep for a job that was stopped."""
    if info.driver_exit_code is not None:
        code = int(info.driver_exit_code)
        if code < 0:
            _tell(f"error: the job's driver was ended by signal {-code}")
        # As a shell tells it.
        return code if code >= 0 else 128 - code
    said = exit_code_in(tail)
    if said is not None:
        return said
    if info.status == "STOPPED":
        _tell("error: the job was stopped before it could save")
    else:
        _tell(f"error: the job failed: {info.message}")
    return EXIT_DEFECT


def _stop(client: "JobSubmissionClient", job_id: str) -> bool:
    _tell("stopping the job, which saves first ...")
    with suppress(*_connection_errors()):
        client.stop_job(job_id)
        return True
    _tell("The head does not answer; the job was not stopped.")
    return False


def _ask() -> str:
    """What Ctrl-C is to do: stop, detach or watch. Without a terminal there is nobody to ask, and it stops."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return "stop"
    print("\n[s]top the job, [d]etach and let it run, or keep [w]atching? ", end="", file=sys.stderr, flush=True)
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        answer = sys.stdin.readline().strip().lower()
    except KeyboardInterrupt:
        return "stop"
    finally:
        signal.signal(signal.SIGINT, old)
    return {"s": "stop", "d": "detach"}.get(answer[:1], "watch")


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _connection_errors() -> tuple[type[Exception], ...]:
    import aiohttp

    # The client raises RuntimeError for a closed web socket and for an answer that it does not expect.
    return (aiohttp.ClientError, ConnectionError, RuntimeError, OSError, TimeoutError)
