"""The trials of a replay while they run: what Tune is given, what MLflow is told."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelines.data import TokenDataset, TrainBatches
from pipelines.description import Status
from pipelines.errors import UserError
from pipelines.outcome import Ending
from pipelines.run_folder import RunFolder
from pipelines.shards import Shards
from pipelines.text import fit_to_text
from pipelines.tracking_store import TrackingStore
from pipelines.views import run_colour
from tuning.replay_faults import write_faults
from tuning.replay_plan import Arm, Plan, arm_journal
from tuning.replay_run import ReplayRun
from tuning.replay_verdict import Measured, measure_replay
from tuning.trial_rank import TrialJob
from tuning.trial_runs import TrackedTrial, TrialRuns, free_folder
from tuning.trials import TrialSource

_STATUS: dict[str, Status] = {"finished": "FINISHED", "diverged": "FAILED"}


@dataclass(frozen=True)
class Trial:
    """A treatment's trial that has ended."""

    arm: Arm
    folder: RunFolder
    measured: Measured


def samples_of_spike(plan: Plan, shards: Shards) -> list[int]:
    """The samples of the steps from the event's onset to the event, as the run read them."""
    config = fit_to_text(plan.arms[0].config, shards)
    dataset = TokenDataset(shards.train, config.data.sequence_length, config.model.mtp.depth)
    batches = TrainBatches(dataset, config, rank=0, world=1)
    for skipped in plan.journal.skipped_samples:
        batches.skip(skipped.samples, skipped.from_step)
    return [int(sample) for step in range(plan.onset - 1, plan.event.step) for sample in batches.sample_ids(step)]


class ReplayTrials(TrialSource):
    """The `tuning.trials.TrialSource` of a replay."""

    def __init__(
        self,
        plan: Plan,
        run: ReplayRun,
        shards: Shards,
        store: TrackingStore,
        checkpoint: Path | None,
        stop: threading.Event,
        on_end: Callable[[Trial, float], None],
    ) -> None:
        """
        Args:
            plan: the replay.
            run: the parent of its trials.
            shards: their text.
            store: where they are recorded.
            checkpoint: what they begin with; None is the run's first step.
            stop: set when the replay must end early.
            on_end: called with each trial that has ended, and its seconds.
        """
        self._plan, self._run, self._shards, self._checkpoint = plan, run, shards, checkpoint
        self._stop, self._on_end = stop, on_end
        self._samples = samples_of_spike(plan, shards)
        self._waiting = list(enumerate(plan.arms))
        self._running: dict[str, tuple[Arm, TrackedTrial]] = {}
        self._started: dict[str, float] = {}
        self._runs = TrialRuns(store, shards, run.info.id)
        self._done: dict[str, Trial] = {}
        self.failure: Exception | None = None
        """Why the replay cannot go on: a UserError if what the user gave is the reason."""

    @property
    def done(self) -> list[Trial]:
        """The trials that have ended, in the order of the plan."""
        return [self._done[arm.name] for arm in self._plan.arms if arm.name in self._done]

    @property
    def samples(self) -> Sequence[int]:
        """Those that a treatment leaves out."""
        return self._samples

    @property
    def untold(self) -> list[str]:
        """Trials that MLflow could not be told of."""
        return self._runs.untold

    def next(self) -> tuple[str, TrialJob] | Literal["wait", "end"]:
        """The next treatment."""
        if not self._waiting:
            return "end"
        number, arm = self._waiting.pop(0)
        config = fit_to_text(arm.config, self._shards)
        folder = free_folder(f"{self._run.info.id}-{arm.name}")
        arm_journal(self._plan, arm.change, self._samples).write(folder.journal)
        write_faults(folder, config, self._plan.faults_left_out)
        name = f"{arm.name}-{self._plan.event.id}"
        self._running[arm.name] = arm, TrackedTrial(name, config, folder, self._tags(arm, number))
        job = TrialJob(
            config=config.model_dump(mode="json"),
            run_folder=str(folder.path),
            shards=str(self._shards.folder),
            until_step=self._plan.until,
        )
        if self._checkpoint is not None:
            job |= {"checkpoint": str(self._checkpoint), "fresh": list(arm.change.fresh)}
        elif (weights := self._plan.run.init_from) is not None:
            job |= {"init_from": str(weights)}
        return arm.name, job

    def started(self, name: str) -> None:
        """A trial has its actors, for the first time or again."""
        if name not in self._started:
            self._started[name] = time.monotonic()
            self._runs.started(self._running[name][1])

    def ended(self, name: str, ending: Ending) -> None:
        """A trial has come to its own end."""
        if ending.outcome not in _STATUS:
            self._fail(name, UserError(f"{name}: {ending.reason}"))
            return
        arm, tracked = self._running.pop(name)
        trial = Trial(arm, tracked.folder, measure_replay(self._plan, tracked.folder, ending))
        self._runs.ended(tracked, _STATUS[ending.outcome], ending.reason, trial.measured.figures())
        self._done[name] = trial
        self._on_end(trial, time.monotonic() - self._started[name])

    def failed(self, name: str, reason: str) -> None:
        """A trial's actors failed for good."""
        self._fail(name, RuntimeError(f"{name} failed: {reason}"))

    def close(self) -> None:
        """Tell MLflow of the trials that were left where they were, and wait until it knows everything."""
        for name, (_, tracked) in self._running.items():
            if name in self._started:
                self._runs.ended(tracked, "KILLED", "the replay ended early")
        self._runs.close()

    def _fail(self, name: str, failure: Exception) -> None:
        self._runs.ended(self._running.pop(name)[1], "FAILED", str(failure))
        self.failure = self.failure or failure
        self._stop.set()

    def _tags(self, arm: Arm, number: int) -> dict[str, str]:
        return {
            "role": "replay",
            "arm": arm.name,
            "replay": self._run.info.name,
            "replay.run": self._plan.run.info.name,
            "replay.event": self._plan.event.id,
            "mlflow.runColor": run_colour(number),
        }
