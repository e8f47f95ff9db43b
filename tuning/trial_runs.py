"""What MLflow is told of trials, in a thread of its own: they do not wait for it."""

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from pipelines.config import RunConfig
from pipelines.delivery import deliver
from pipelines.description import Status
from pipelines.ending import ending_of
from pipelines.errors import UserError
from pipelines.home import runs_dir
from pipelines.run_folder import RunFolder, write_json
from pipelines.shards import Shards
from pipelines.spool import span_ms
from pipelines.text import dataset_info
from pipelines.tracking import FINISH_TIMEOUT_S, Tracker, TrialPlace
from pipelines.tracking_store import TrackingStore

_log = logging.getLogger(__name__)


@dataclass
class TrackedTrial:
    """A trial as MLflow sees it."""

    name: str
    config: RunConfig
    folder: RunFolder
    tags: Mapping[str, str]
    tracker: Tracker | None = None
    """There is none before MLflow was told, or while it could not be told."""


@dataclass(frozen=True)
class _End:
    """How a trial has ended."""

    trial: TrackedTrial
    status: Status
    reason: str | None
    figures: Mapping[str, float] | None
    tags: Mapping[str, str] | None


class TrialRuns:
    """The runs of the trials of one parent."""

    def __init__(self, store: TrackingStore, shards: Shards, parent: str) -> None:
        """``parent`` is MLflow's id of the parent's run; all trials read ``shards``."""
        self._store, self._shards, self._parent = store, shards, parent
        self._mlflow = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mlflow")
        self._told: list[Future[None]] = []
        self._untold: list[_End] = []

    @property
    def untold(self) -> list[str]:
        """Trials that MLflow could not be told of; before `close` it may still be told."""
        return [end.trial.name for end in self._untold]

    def started(self, trial: TrackedTrial) -> None:
        """It has begun."""
        self._tell(self._open, trial)

    def ended(
        self,
        trial: TrackedTrial,
        status: Status,
        reason: str | None,
        figures: Mapping[str, float] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """It has ended. With ``figures`` of its end MLflow is told even if it could not be told of the beginning."""
        self._tell(self._end, _End(trial, status, reason, figures, tags))

    def close(self) -> None:
        """Wait until MLflow knows everything, what it missed while it was away included."""
        self._mlflow.shutdown(wait=True)
        for told in self._told:
            told.result()
        self._make_up()

    def _tell(self, action: Callable[..., None], *arguments: object) -> None:
        self._told.append(self._mlflow.submit(action, *arguments))

    def _open(self, trial: TrackedTrial) -> None:
        tracking = trial.config.tracking.model_copy(update={"run_name": trial.name})
        try:
            trial.tracker = Tracker.start(
                trial.config.model_copy(update={"tracking": tracking}),
                self._store,
                dataset=dataset_info(self._shards),
                resume=trial.folder if trial.folder.is_run else None,
                trial=TrialPlace(trial.folder, self._parent),
                tags=trial.tags,
            )
            trial.tracker.__enter__()
        except UserError as error:
            _log.info("MLflow was not told of trial %s yet: %s", trial.name, error)

    def _end(self, end: _End) -> None:
        if not self._told_end(end):
            self._untold.append(end)

    def _told_end(self, end: _End) -> bool:
        """Whether MLflow has all of a trial that is over."""
        trial = end.trial
        if trial.tracker is None and end.figures is not None:
            self._open(trial)
        if trial.tracker is None:
            if trial.folder.is_run:
                # MLflow went while the run was made: what is delivered of it later must be true. It is without the tags
                # of its end, for a sweep that goes on knows by them which trials MLflow has been told of as a whole.
                ending = ending_of(trial.folder, trial.config, end.status, end.reason, _last_ms(trial.folder))
                ending["metrics"] |= end.figures or {}
                try:
                    write_json(trial.folder.ending, ending)
                except OSError as error:
                    _log.warning("%s cannot be written: %s", trial.folder.ending, error)
            return False
        trial.tracker.figures = dict(end.figures or {})
        trial.tracker.tags = dict(end.tags or {})
        trial.tracker.end_as(end.status, end.reason, _last_ms(trial.folder))
        trial.tracker.__exit__(None, None, None)
        return trial.tracker.undelivered is None

    def _make_up(self) -> None:
        """What MLflow could not be told, again; up to the first that it cannot be told now."""
        # Of one that was left where it is, and that MLflow has never heard of, there is nothing to tell.
        tellable = [end for end in self._untold if end.trial.tracker is not None or end.figures is not None]
        for end in tellable:
            try:
                # A tracker has ended its run, but for what its folder keeps.
                told = self._told_end(end) if end.trial.tracker is None else _is_delivered(end.trial.folder)
            except UserError as error:
                _log.info("MLflow was not told of trial %s: %s", end.trial.name, error)
                return
            if not told:
                return
            self._untold.remove(end)


def _last_ms(folder: RunFolder) -> int | None:
    """When a trial did the last thing of which there is a record, milliseconds since 1970: MLflow may be told later."""
    span = span_ms(folder.spool)
    return span[1] if span is not None else None


def _is_delivered(folder: RunFolder) -> bool:
    return deliver(folder, FINISH_TIMEOUT_S) is None


def free_folder(name: str) -> RunFolder:
    """A run's folder that is not there yet: a trial that was interrupted is begun anew, and its first attempt stays."""
    path, number = runs_dir() / name, 1
    while path.exists():
        number += 1
        path = runs_dir() / f"{name}-{number}"
    return RunFolder(path)
