"""From a run's folder to MLflow: a thread of the driver that brings over what training has written down.

What is delivered is remembered in the folder, after the fact: a crash in between delivers a batch again, and MLflow
drops points that are the same in name, step, time and value. So every point arrives, and arrives once.
"""

import itertools
import logging
import threading
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.config import TrackingConfig
from pipelines.ending import end_if_orphaned
from pipelines.errors import first_line
from pipelines.outage import Outage
from pipelines.outbox import Outbox
from pipelines.registration import CheckpointRegistry
from pipelines.rehearsal import refuse_if_cut_off
from pipelines.run_folder import RunFolder, read_json, write_json
from pipelines.run_lock import RunLock
from pipelines.spike_tracking import EventDelivery
from pipelines.spool import Record, SpoolReader
from pipelines.tracking_store import open_store, tracking_uri
from pipelines.view_publishing import publish_views

if TYPE_CHECKING:
    from mlflow import MlflowClient

_log = logging.getLogger(__name__)

BATCH_METRICS = 1000
"""MLflow's limit for one request."""

# The UI refreshes every 30 s at the soonest; a batch costs some 20 ms of a core that workers may want.
INTERVAL_S = 2.0
# How long a server may be gone before it is noticed, whatever waits to be delivered. To ask costs it and this process
# some milliseconds, and training nothing.
_PROBE_S = 1.0
# Pauses while a server is down grow to 16 times the interval.
_MOST_DOUBLINGS = 4
# While the user waits for the end, a server that comes back is noticed soon.
_LAST_PAUSE_S = 0.5


class Delivery:
    """What of one run MLflow has yet to get."""

    def __init__(self, client: "MlflowClient", folder: RunFolder, lag_steps: int = 0) -> None:
        """``lag_steps``: how far training can go back in memory; so many of the newest steps wait."""
        self._client = client
        self._folder = folder
        self._run_id = folder.info.id
        state = read_json(folder.delivered)
        self._ended = bool(state.get("ended", False))
        self._delivered_offset = _end_of_a_line(folder.spool, int(state.get("offset", 0)))
        self.ending: dict[str, Any] | None = None
        """How the run ended, if there was no room on the disk to write it down."""
        self._reader = SpoolReader(folder.spool, self._delivered_offset)
        self._outbox = Outbox(lag_steps, state.get("steps", {}) if self._delivered_offset else {})
        self._registry = CheckpointRegistry(client, folder)
        self._events = EventDelivery(client, folder)

    def send(self, everything: bool = True) -> None:
        """Deliver what there is by now: metrics, then the ending if the run has ended, then its checkpoints.

        ``everything`` is for a run that cannot go back any more: no step waits.

        Raises:
            MlflowException, SQLAlchemyError, OSError: something did not arrive; the next call goes on from there.
        """
        self._outbox.add(self._reader.read())
        due = deque(self._outbox.due(everything))
        while due:
            self._send_batch(due)
        if self.ending_left:
            self._send_ending()
        # Last: what a server may refuse that is older than logged models must not hold up the rest.
        self._registry.send()
        self._events.send(self._ended)

    def left(self) -> int:
        """Points of metrics that have not been delivered."""
        return sum(len(record.metrics) for record in SpoolReader(self._folder.spool, self._delivered_offset).read())

    def checkpoints_left(self) -> int:
        """Checkpoints that are to be registered, or deleted."""
        return self._registry.left()

    def events_left(self) -> int:
        """Spike events that have not been delivered, or not as they ended."""
        return self._events.left()

    @property
    def ending_left(self) -> bool:
        """Whether the run has ended and MLflow does not know it yet."""
        return not self._ended and (self.ending is not None or self._folder.ending.exists())

    def _send_batch(self, due: deque[Record]) -> None:
        from mlflow.entities import Metric

        sizes = itertools.accumulate(len(record.metrics) for record in due)
        # At least one record: one that alone is above the limit goes in several requests.
        count = max(1, sum(1 for _ in itertools.takewhile(lambda size: size <= BATCH_METRICS, sizes)))
        batch = [due.popleft() for _ in range(min(count, len(due)))]
        metrics = [
            Metric(name, value, record.time_ms, record.step)
            for record in batch
            for name, value in record.metrics.items()
        ]
        for start in range(0, len(metrics), BATCH_METRICS):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + BATCH_METRICS], synchronous=True)
        self._outbox.sent(batch)
        self._delivered_offset = batch[-1].end
        self._remember()

    def _send_ending(self) -> None:
        from mlflow.entities import Metric, RunTag

        ending = self.ending or read_json(self._folder.ending)
        self._client.log_batch(
            self._run_id,
            metrics=[Metric(name, value, ending["time_ms"], 0) for name, value in ending["metrics"].items()],
            tags=[RunTag(name, value) for name, value in ending["tags"].items()],
            synchronous=True,
        )
        # Before the pictures, which a user could do without: a status that is not true is worse.
        self._client.set_terminated(self._run_id, ending["status"], ending["time_ms"])
        if self._folder.figures.is_dir():
            self._client.log_artifacts(self._run_id, str(self._folder.figures), self._folder.figures.name)
        self._ended = True
        self._remember()

    def _remember(self) -> None:
        try:
            state = {"offset": self._delivered_offset, "ended": self._ended, "steps": self._outbox.delivered}
            write_json(self._folder.delivered, state)
        except OSError as error:
            # No failure of the server: a later command sends again what MLflow has, and it drops that.
            _log.warning("%s cannot be written: %s", self._folder.delivered, error)


def _end_of_a_line(spool: Path, offset: int) -> int:
    """``offset``, if a line of the spool ends there. Otherwise 0: it is another file, to be sent from its start."""
    try:
        with spool.open("rb") as file:
            file.seek(max(0, offset - 1))
            return offset if offset > 0 and file.read(1) == b"\n" else 0
    except FileNotFoundError:
        return 0


class Drainer:
    """The thread that delivers while a run lasts. Whatever becomes of the server, training does not notice."""

    def __init__(
        self,
        client: "MlflowClient",
        folder: RunFolder,
        lock: RunLock,
        interval_s: float = INTERVAL_S,
        lag_steps: int = 0,
    ) -> None:
        """``lock`` is the run's, and is released by the thread when it ends: no other may deliver beside it.

        ``lag_steps``: as of `Delivery`; until the run is over.
        """
        self._client = client
        self._lock = lock
        self._delivery = Delivery(client, folder, lag_steps)
        self._folder = folder
        self._outage = Outage(folder)
        self._interval_s = interval_s
        self._finishing = threading.Event()
        self._given_up = threading.Event()
        self._done = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="mlflow-delivery", daemon=True)

    def start(self) -> None:
        """Begin to deliver."""
        self._thread.start()

    def finish(self, timeout_s: float, ending: dict[str, Any] | None = None) -> str | None:
        """Deliver the rest, the ending included, for at most ``timeout_s``; what to tell the user if any is left.

        Nothing must be written to the spool any more. ``ending`` is for a run whose folder has no room for it.
        """
        self._delivery.ending = ending
        self._finishing.set()
        self._thread.join(timeout_s)
        # A request that is under way is let finish, and the lock stays until then.
        self._given_up.set()
        if self._done:
            return None
        info = self._folder.info
        points = self._delivery.left()
        left = [f"{points:,} points"] if points else []
        left += ["the ending"] if self._delivery.ending_left else []
        checkpoints = self._delivery.checkpoints_left()
        left += [f"{checkpoints} checkpoint{'s' if checkpoints > 1 else ''}"] if checkpoints else []
        events = self._delivery.events_left()
        left += [f"{events} spike event{'s' if events > 1 else ''}"] if events else []
        why = f" ({first_line(self._error)})" if self._error else ""
        where = f"MLflow at {info.tracking_uri}"
        return (
            f"{' and '.join(left)} of run {info.name} could not be delivered to {where}{why}; "
            f"they are kept in {self._folder.path}, and `steadymoe deliver {info.name}` sends them"
        )

    def _run(self) -> None:
        try:
            publish_views(self._client, self._folder.info.experiment_id)
            self._send_until_done()
        finally:
            self._lock.release()

    def _send_until_done(self) -> None:
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        failures = 0
        while not self._given_up.is_set():
            # Asked before sending: what was written before `finish` was called is then sent for certain.
            finishing = self._finishing.is_set()
            try:
                self._ask()
                self._delivery.send(everything=finishing)
                failures, self._error = 0, None
                if self._outage.is_over():
                    self._delivery.send(everything=finishing)  # what became of it, too
                if finishing:
                    self._done = True
                    return
                self._watch(self._interval_s)
            except (MlflowException, SQLAlchemyError, OSError, ValueError) as error:
                self._error = error
                self._outage.goes_on(error)
                failures = min(failures + 1, _MOST_DOUBLINGS)
                if finishing:
                    time.sleep(_LAST_PAUSE_S)
                else:
                    self._finishing.wait(self._interval_s * 2**failures)

    def _watch(self, seconds: float) -> None:
        """Wait for so long, or until the run is over. Raises what `_ask` does."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > _PROBE_S and not self._finishing.wait(_PROBE_S):
            self._ask()
        self._finishing.wait(max(0.0, left))

    def _ask(self) -> None:
        """Raises what a delivery would if the store is gone: none is made while all steps wait for a rewind."""
        refuse_if_cut_off(self._folder)
        self._client.get_experiment(self._folder.info.experiment_id)


def deliver(folder: RunFolder, timeout_s: float = 600.0) -> str | None:
    """Send what MLflow did not get when the run ended; what to tell the user if some of it is still left.

    A run whose driver vanished is ended first.

    Raises:
        UserError: the store of the run cannot be opened, or the run is still on.
    """
    lock = RunLock(folder)
    try:
        end_if_orphaned(folder)
        drainer = Drainer(open_store(tracking_uri(TrackingConfig(), folder.info)).client, folder, lock)
    except BaseException:
        lock.release()
        raise
    drainer.start()
    return drainer.finish(timeout_s)
