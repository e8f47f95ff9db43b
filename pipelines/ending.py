"""How a run ended, written down in its folder for the delivery to bring to MLflow."""

import time

from pipelines.config import RunConfig
from pipelines.description import Status, describe
from pipelines.history import History
from pipelines.loading import load_config
from pipelines.notes import read_notes
from pipelines.run_folder import RunFolder, write_json
from pipelines.spool import SpoolReader

DESCRIPTION_TAG = "mlflow.note.content"

# MLflow's limit.
_TAG_LENGTH = 8000


def write_ending(
    folder: RunFolder, config: RunConfig, status: Status, reason: str | None, time_ms: int | None = None
) -> None:
    """Write down status, final figures and description of a run. ``time_ms`` is when it ended; None means now."""
    history = History.read(folder.spool)
    tags = {
        "diverged": str(history.diverged).lower(),
        DESCRIPTION_TAG: describe(config, history, status, reason),
        "restarts": str(sum(note.kind in ("death", "error") for note in read_notes(folder.notes))),
    }
    if history.first_non_finite:
        steps = (f"{name} from step {step}" for name, step in history.first_non_finite.items())
        tags["non_finite"] = ", ".join(steps)[:_TAG_LENGTH]
    ended_ms = time.time_ns() // 1_000_000 if time_ms is None else time_ms
    write_json(folder.ending, {"status": status, "time_ms": ended_ms, "metrics": history.finals(), "tags": tags})


def end_if_orphaned(folder: RunFolder) -> None:
    """End a run that has no ending, because its driver vanished. Its lock must be held by the caller."""
    if folder.ending.exists():
        return
    times = [record.time_ms for record in SpoolReader(folder.spool).read()]
    config = load_config([str(folder.config)], [])
    write_ending(folder, config, "KILLED", "its driver vanished", times[-1] if times else None)
