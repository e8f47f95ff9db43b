"""What MLflow is told of trials, in a thread of its own: they do not wait for it."""

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from pipelines.config import RunConfig
from pipelines.description import Status
from pipelines.errors import UserError
from pipelines.home import runs_dir
from pipelines.run_folder import RunFolder
from pipelines.shards import Shards
from pipelines.text import dataset_info
from pipelines.tracking import Tracker, TrialPlace
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


class TrialRuns:
    """The runs of the trials of one parent."""

    def __init__(self, store: TrackingStore, shards: Shards, parent: str) -> None:
        """``parent`` is MLflow's id of the parent's run; all trials read ``shards``."""
        self._store, self._shards, self._parent = store, shards, parent
        self._mlflow = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mlflow")
        self._told: list[Future[None]] = []
        self.untold: list[str] = []
        """Trials that MLflow could not be told of."""

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
        self._tell(self._end, trial, status, reason, figures, tags)

    def close(self) -> None:
        """Wait until MLflow knows everything."""
        self._mlflow.shutdown(wait=True)
        for told in self._told:
            told.result()

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

    def _end(
        self,
        trial: TrackedTrial,
        status: Status,
        reason: str | None,
        figures: Mapping[str, float] | None,
        tags: Mapping[str, str] | None,
    ) -> None:
        if trial.tracker is None and figures is not None:
            self._open(trial)
        if trial.tracker is None:
            self.untold.append(trial.name)
            return
        trial.tracker.figures = dict(figures or {})
        trial.tracker.tags = dict(tags or {})
        trial.tracker.end_as(status, reason)
        trial.tracker.__exit__(None, None, None)
        if trial.tracker.undelivered:
            self.untold.append(trial.name)


def free_folder(name: str) -> RunFolder:
    """A run's folder that is not there yet: a trial that was interrupted is begun anew, and its first attempt stays."""
    path, number = runs_dir() / name, 1
    while path.exists():
        number += 1
        path = runs_dir() / f"{name}-{number}"
    return RunFolder(path)
