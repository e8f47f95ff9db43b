"""The spike events of a run in MLflow: a trace each, and one table of all of them.

Traces are found under Traces, of the experiment and of the run, and are searched by their tags; the table is the run's
artifact ``spikes.json``, which the UI lays beside those of other runs. A run without events has no table: it would cost
two requests for every trial of a study, and the UI compares the runs that have one.
"""

import json
import logging
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from pipelines import spike_words
from pipelines.run_folder import RunFolder, read_json, write_json
from pipelines.spike_event import SpikeEvent, read_events
from pipelines.spike_trace import trace_of

if TYPE_CHECKING:
    from mlflow import MlflowClient

_log = logging.getLogger(__name__)

TABLE = "spikes.json"

# The UI puts rows of several runs beside each other that are equal in the first column, and shows the second of them.
COLUMNS = (
    "event",
    "kind",
    "step",
    "value",
    "baseline",
    "score",
    "action",
    "outcome",
    "steps_lost",
    "seconds_lost",
    "rewound_to",
    "samples",
    "documents",
    "detail",
    "id",
)
"""Of the table, the same in every run."""

_NAMES_IN_A_CELL = 8
# What the UI knows tables by.
_TABLES_TAG = "mlflow.loggedArtifacts"


class EventDelivery:
    """What MLflow knows of a run's events; ``traced.json`` in the run's folder remembers it by their ids.

    That file is written after the fact. A crash in between sends a trace again, and MLflow has it once.
    """

    def __init__(self, client: "MlflowClient", folder: RunFolder) -> None:
        self._client = client
        self._folder = folder
        known = read_json(folder.traced)
        self._traced: dict[str, Any] = known.get("traces", {})
        self._tabled: dict[str, Any] = known.get("table", {})
        self._read: tuple[int, list[SpikeEvent]] = (0, [])

    def send(self, ended: bool) -> None:
        """Send the events whose outcome is final; with ``ended`` all of them as they stand, and the table.

        Raises:
            MlflowException, SQLAlchemyError, OSError: the store does not take it; the next call goes on from there.
        """
        events = self._events()
        for event in events:
            is_final = event.outcome is not None and event.outcome.state in spike_words.FINAL_STATES
            if (ended or is_final) and self._traced.get(event.id) != _state(event):
                self._trace(event)
                self._traced[event.id] = _state(event)
                self._remember()
        states = {event.id: _state(event) for event in events}
        if ended and states != self._tabled:
            self._tabulate(events)
            self._tabled = states
            self._remember()

    def left(self) -> int:
        """Events of which MLflow does not know all that is known."""
        return sum(
            self._traced.get(event.id) != _state(event) or self._tabled.get(event.id) != _state(event)
            for event in self._events()
        )

    def _events(self) -> list[SpikeEvent]:
        """Read again only if there is more: this is asked for every two seconds, beside training."""
        try:
            size = self._folder.events.stat().st_size
        except FileNotFoundError:
            return []
        if size != self._read[0]:
            self._read = (size, read_events(self._folder.events))
        return self._read[1]

    def _remember(self) -> None:
        try:
            write_json(self._folder.traced, {"traces": self._traced, "table": self._tabled})
        except OSError as error:
            # No failure of the server: a later command sends again what MLflow has, and it keeps one of them.
            _log.warning("%s cannot be written: %s", self._folder.traced, error)

    def _trace(self, event: SpikeEvent) -> None:
        """Write a trace to the client's own store, at once.

        The tracing of a process, which MLflow's client uses as well, would send it to the store that is the default of
        the process, and later.
        """
        from mlflow.exceptions import MlflowException
        from mlflow.tracing.client import TracingClient

        store = TracingClient(self._client.tracking_uri)
        head, spans = trace_of(event, self._folder.info)
        # In this order: what the spans would tell of the trace is then known, and stays.
        store.start_trace(head)
        try:
            store.log_spans(self._folder.info.experiment_id, spans)
        except NotImplementedError as error:
            raise MlflowException(str(error)) from error

    def _tabulate(self, events: list[SpikeEvent]) -> None:
        """Write the table as MLflow's ``log_table`` does, which would add to the one that an earlier end has left."""
        rows = [_row(number, event) for number, event in enumerate(events, 1)]
        run_id = self._folder.info.id
        self._client.log_text(run_id, json.dumps({"columns": list(COLUMNS), "data": rows}, ensure_ascii=False), TABLE)
        tables = json.loads(self._client.get_run(run_id).data.tags.get(_TABLES_TAG, "[]"))
        entry = {"path": TABLE, "type": "table"}
        if entry not in tables:
            self._client.set_tag(run_id, _TABLES_TAG, json.dumps([*tables, entry]))


def _row(number: int, event: SpikeEvent) -> list[Any]:
    lost = event.outcome
    row = {
        **event.model_dump(mode="json", include={*COLUMNS}),
        "event": number,
        "outcome": spike_words.short_outcome(event),
        "steps_lost": lost.steps_lost if lost else None,
        "seconds_lost": round(lost.seconds_lost, 3) if lost else None,
        "samples": _some(map(str, event.samples)),
        "documents": _some(PurePosixPath(name).name for name in event.documents),
    }
    return [row[column] for column in COLUMNS]


def _some(names: Iterable[str]) -> str:
    """The first few, for a cell of the table."""
    found = list(names)
    more = len(found) - _NAMES_IN_A_CELL
    return ", ".join(found[:_NAMES_IN_A_CELL]) + (f" and {more:,} more" if more > 0 else "")


def _state(event: SpikeEvent) -> dict[str, Any]:
    """What may change of an event once it is written down."""
    return {} if event.outcome is None else event.outcome.model_dump(mode="json")
