"""The trials of a study while they run: what Tune is given, what MLflow is told, what the study remembers."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelines.description import Status
from pipelines.errors import UserError
from pipelines.outcome import Ending
from pipelines.run_folder import RunFolder
from pipelines.shards import Shards
from pipelines.text import fit_to_text
from pipelines.tracking_store import TrackingStore
from pipelines.views import run_colour
from tuning.blocks import Blocks
from tuning.matching import matched
from tuning.outcome import measure_trial
from tuning.recording import read_series
from tuning.results import TrialKey, TrialResult
from tuning.study_config import StudyConfig, Tree
from tuning.study_loading import trial_config
from tuning.study_run import StudyRun, TrialRecord
from tuning.trial_rank import TrialJob
from tuning.trial_runs import TrackedTrial, TrialRuns, free_folder
from tuning.trials import TrialSource

_STATUS: dict[str, Status] = {"finished": "FINISHED", "diverged": "FAILED"}


@dataclass
class _Running:
    key: TrialKey
    run: TrackedTrial
    matched: Tree
    started: float = 0.0


class StudyTrials(TrialSource):
    """The `tuning.trials.TrialSource` of a study."""

    def __init__(
        self,
        study: StudyConfig,
        run: StudyRun,
        blocks: Blocks,
        shards: Shards,
        store: TrackingStore,
        stop: threading.Event,
        on_end: Callable[[TrialResult, float], None],
    ) -> None:
        """
        Args:
            study: its config.
            run: the parent of its trials.
            blocks: which trial comes next.
            shards: the text of all trials.
            store: where trials are recorded.
            stop: set when the study must end early.
            on_end: called with the result of each trial and its seconds.
        """
        self._study, self._run, self._blocks, self._shards = study, run, blocks, shards
        self._stop, self._on_end = stop, on_end
        self._records = {record.key: record for record in run.trials}
        self._running: dict[str, _Running] = {}
        self._colours = {arm: run_colour(number) for number, arm in enumerate(study.arms)}
        self._runs = TrialRuns(store, shards, run.info.id)
        self.failure: Exception | None = None
        """Why the study cannot go on: a UserError if the config is the reason."""

    @property
    def untold(self) -> list[str]:
        """Trials that MLflow could not be told of."""
        return self._runs.untold

    def next(self) -> tuple[str, TrialJob] | Literal["wait", "end"]:
        """The next trial."""
        key = self._blocks.next()
        if not isinstance(key, TrialKey):
            return key
        matched = self._matched(key)
        config = fit_to_text(trial_config(self._study, key, matched), self._shards)
        folder = free_folder(f"{self._run.info.id}-{key.name}")
        self._running[key.name] = _Running(key, TrackedTrial(key.name, config, folder, self._tags(key)), matched)
        job = TrialJob(
            config=config.model_dump(mode="json"), run_folder=str(folder.path), shards=str(self._shards.folder)
        )
        return key.name, job

    def started(self, name: str) -> None:
        """A trial has its actors, for the first time or again."""
        trial = self._running[name]
        self._blocks.started(trial.key)
        if not trial.started:
            trial.started = time.monotonic()
            self._runs.started(trial.run)

    def ended(self, name: str, ending: Ending) -> None:
        """A trial has come to its own end."""
        trial = self._running.pop(name)
        if ending.outcome not in _STATUS:
            self._fail(trial, UserError(f"trial {name}: {ending.reason}"))
            return
        seconds = time.monotonic() - trial.started
        try:
            result = TrialResult(trial.key, measure_trial(trial.run.folder, trial.run.config))
        except ValueError as error:
            # Its first loss was not finite, or every batch was corrupted: with such an arm nothing can be compared.
            self._fail(trial, UserError(f"trial {name}: {error}"))
            return
        record = TrialRecord(trial.key, str(trial.run.folder.path), ending.outcome, round(seconds, 2), trial.matched)
        self._run.record(record)
        self._records[trial.key] = record
        self._blocks.ended(trial.key)
        figures = {f"study/{name}": value for name, value in result.measures.items()}
        self._runs.ended(trial.run, _STATUS[ending.outcome], ending.reason, figures)
        self._on_end(result, seconds)

    def failed(self, name: str, reason: str) -> None:
        """A trial's actors failed for good."""
        self._fail(self._running.pop(name), RuntimeError(f"trial {name} failed: {reason}"))

    def close(self) -> None:
        """Tell MLflow of the trials that were left where they were, and wait until it knows everything."""
        for trial in self._running.values():
            if trial.started:
                self._runs.ended(trial.run, "KILLED", "the study ended early")
        self._runs.close()

    def _fail(self, trial: _Running, failure: Exception) -> None:
        """No other trial could do better, or nothing is right with the machine."""
        self._runs.ended(trial.run, "FAILED", str(failure))
        self.failure = self.failure or failure
        self._stop.set()

    def _matched(self, key: TrialKey) -> Tree:
        """What an arm that is tuned to others takes from their results."""
        arm = self._study.arms[key.arm]
        records = {other: self._records[TrialKey(key.seed, other, key.point)] for other in arm.needs}
        return matched(arm, {other: read_series(RunFolder(Path(r.folder))) for other, r in records.items()})

    def _tags(self, key: TrialKey) -> dict[str, str]:
        return {
            "role": "study",
            "arm": key.arm,
            "study": self._run.info.name,
            "arm_of_study": f"{key.arm} · {self._run.info.name}",
            "mlflow.runColor": self._colours[key.arm],
        }
