"""The MLflow parent of trials, and its folder: what studies, sweeps and replays have in common."""

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from pipelines.delivery import Drainer
from pipelines.description import Status
from pipelines.ending import parent_ending
from pipelines.errors import UserError
from pipelines.job import job_tags
from pipelines.run_folder import (
    RunFolder,
    RunInfo,
    read_json,
    write_json,
    write_whole,
)
from pipelines.run_lock import RunLock
from pipelines.tracking import FINISH_TIMEOUT_S
from pipelines.tracking_store import TrackingStore, find_tracked_run, shown, store_errors


class ParentRun:
    """As a context manager it ends the run on every way out, exceptions included."""

    def __init__(self, store: TrackingStore, folder: RunFolder, lock: RunLock, description: str) -> None:
        self.folder, self.info = folder, folder.info
        self.description = description
        self.undelivered: str | None = None
        """After the end: what to tell the user if MLflow could not be given everything."""
        self.status: Status | None = None
        """How it ends, where that is not what the exception on the way out says."""
        self.figures: dict[str, float] = {}
        """Metrics of its end."""
        self._drainer = Drainer(store.client, folder, lock)

    def __enter__(self) -> Self:
        self._drainer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        status: Status = "FINISHED" if error is None else "KILLED" if kind is KeyboardInterrupt else "FAILED"
        ending = parent_ending(self.status or status, self.description, self.figures)
        write_json(self.folder.ending, ending)
        self.undelivered = self._drainer.finish(FINISH_TIMEOUT_S, ending)


def make_parent(
    store: TrackingStore,
    place: Path,
    name: str,
    experiment: str,
    *,
    tags: Mapping[str, str],
    params: Mapping[str, str],
    files: Mapping[str, str],
) -> tuple[RunFolder, RunLock]:
    """A new run and its folder in ``place``, with these text files (``config.yaml`` at least) by their names; locked.

    Raises:
        UserError: the store refuses.
    """
    from mlflow.entities import Param

    with store_errors(store.uri):
        client, experiment_id = store.client, store.experiment_id(experiment)
        tags = {"mlflow.source.type": "LOCAL", **job_tags(), **tags}
        run = client.create_run(experiment_id, run_name=name, tags=tags)
        folder = RunFolder(place / run.info.run_id)
        created = datetime.now(UTC).isoformat(timespec="milliseconds")
        try:
            for file, text in files.items():
                write_whole(folder.path / file, text)
            lock = RunLock(folder)
            folder.write_info(RunInfo(run.info.run_id, name, experiment, experiment_id, created, shown(store.uri)))
        except BaseException:
            client.set_terminated(run.info.run_id, "FAILED")
            raise
        client.log_batch(run.info.run_id, params=[Param(key, value) for key, value in params.items()])
        client.log_artifact(run.info.run_id, str(folder.config))
    return folder, lock


def reopen_parent(store: TrackingStore, folder: RunFolder, config: str) -> RunLock:
    """Take up a run that goes on, with ``config`` as the text of its ``config.yaml``; locked.

    Raises:
        UserError: another process works on it, or the store does not know it.
    """
    with store_errors(store.uri):
        lock = RunLock(folder)
        find_tracked_run(store, folder.info)
        folder.write_info(replace(folder.info, tracking_uri=shown(store.uri)))
        # In this order: a driver that vanishes in between leaves an ending that is sent again.
        write_json(folder.delivered, {**read_json(folder.delivered), "ended": False})
        store.client.update_run(folder.info.id, status="RUNNING")
        for tag, value in job_tags().items():
            store.client.set_tag(folder.info.id, tag, value)
        write_whole(folder.config, config)
        folder.ending.unlink(missing_ok=True)
    return lock


class Progress:
    """What a parent remembers from command to command, in ``progress.json`` of its folder."""

    FILE = "progress.json"

    def __init__(self, folder: RunFolder) -> None:
        self._path = folder.path / self.FILE

    @staticmethod
    def fresh(digest: str) -> str:
        """The file's text at the start; ``digest`` is that of everything that trials stand on."""
        return json.dumps({"digest": digest, "minutes": 0.0})

    def refuse_other(self, digest: str, what: str) -> None:
        """UserError if the parent (``study clip-1``) was begun with another digest."""
        if read_json(self._path).get("digest") != digest:
            raise UserError(
                f"{what}: the presets or the text that it stands on are not what they were when it was begun, so that "
                "its trials could not be compared; start a new one"
            )

    @property
    def minutes(self) -> float:
        """How long trials have run so far, in all commands together."""
        return float(read_json(self._path).get("minutes", 0.0))

    def add_minutes(self, minutes: float) -> None:
        """So long have trials run besides."""
        known = read_json(self._path)
        write_json(self._path, {**known, "minutes": self.minutes + minutes})


class Stopwatch:
    """Adds to a parent's minutes as they pass, so that a killed driver's are not lost."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._noted = progress, time.monotonic()

    def note(self) -> None:
        """Write down what has passed since the last time."""
        now = time.monotonic()
        self._progress.add_minutes((now - self._noted) / 60)
        self._noted = now
