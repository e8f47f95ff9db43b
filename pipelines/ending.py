"""How a run ended, written down in its folder for the delivery to bring to MLflow."""

import time
from collections.abc import Mapping
from typing import Any

from pipelines.config import RunConfig
from pipelines.description import Status, describe
from pipelines.errors import UserError
from pipelines.history import History
from pipelines.loading import load_config
from pipelines.notes import read_notes
from pipelines.run_folder import RunFolder, write_json
from pipelines.run_lock import writer_lock
from pipelines.spike_event import read_events, steps_lost
from pipelines.spool import span_ms

DESCRIPTION_TAG = "mlflow.note.content"

# MLflow's limit.
_TAG_LENGTH = 8000


def ending_of(
    folder: RunFolder, config: RunConfig | None, status: Status, reason: str | None, time_ms: int | None = None
) -> dict[str, Any]:
    """What the run's file ``end.json`` holds: status, final figures and description.

    Args:
        folder: the run.
        config: what it was to do; None if that cannot be read any more, then there is no description.
        status: how it ended.
        reason: why it ended early.
        time_ms: when it ended, in milliseconds since 1970; None means now.
    """
    history, events = History.read(folder.spool), read_events(folder.events)
    tags = {
        "diverged": str(history.diverged).lower(),
        "restarts": str(sum(note.kind in ("death", "error") for note in read_notes(folder.notes))),
    }
    if config is not None:
        tags[DESCRIPTION_TAG] = describe(config, history, status, reason, events)
    if history.first_non_finite:
        steps = (f"{name} from step {step}" for name, step in history.first_non_finite.items())
        tags["non_finite"] = ", ".join(steps)[:_TAG_LENGTH]
    ended_ms = time.time_ns() // 1_000_000 if time_ms is None else time_ms
    metrics = {
        **history.finals(),
        "final/spikes": float(sum(event.is_training for event in events)),
        "final/steps_lost": float(steps_lost(events)),
    }
    return {"status": status, "time_ms": ended_ms, "metrics": metrics, "tags": tags}


def parent_ending(status: Status, description: str, figures: Mapping[str, float]) -> dict[str, Any]:
    """The same of a run that trains nothing itself, ended now."""
    now = time.time_ns() // 1_000_000
    return {"status": status, "time_ms": now, "metrics": dict(figures), "tags": {DESCRIPTION_TAG: description}}


def end_if_orphaned(folder: RunFolder) -> None:
    """End a run that has no ending, because its driver vanished. Its run lock must be held by the caller.

    Raises:
        RunBusyError: a training worker has outlived the driver so far.
    """
    if folder.ending.exists():
        return
    with writer_lock(folder, patience_s=0.0):
        span = span_ms(folder.spool)
        try:
            config = load_config([str(folder.config)], [])
        except UserError:
            # Of another version of this project.
            config = None
        ending = ending_of(folder, config, "KILLED", "its driver vanished", span[1] if span else None)
        write_json(folder.ending, ending)
