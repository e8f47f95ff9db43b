"""A trial that is a whole Ray Train run: workers that die are started again under it, as often as in any other run.

It costs some ten seconds and eight processes a trial (`tuning.trial` has none of that), so it is for long ones.
"""

import threading
import time
from concurrent.futures import Future, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray import tune

from pipelines.config import RunConfig
from pipelines.fit import run_workers
from pipelines.outcome import Ending
from pipelines.ray_session import set_defaults
from pipelines.run_folder import RunFolder
from pipelines.spool import TRAIN, SpoolReader
from tuning.nested_worker import NestedJob, train_trial
from tuning.rung_gate import close_gate, forget_gate, knocked, open_gate
from tuning.trial import JOB, trial_result
from tuning.trial_rank import Progress, TrialJob

# How long the actor is out of reach, and how late it sees a rung.
_POLL_S = 0.25
# How long workers may take to end in order.
_END_S = 60.0


def resources() -> tune.PlacementGroupFactory:
    """What the trial itself occupies: nothing that its workers, which Ray Train places, could miss.

    Tune wants some resource. Every cluster has this one, on its head.
    """
    return tune.PlacementGroupFactory([{"node:__internal_head__": 0.001}])


class NestedTrial(tune.Trainable):  # type: ignore[misc]
    """Runs one trial's workers, and follows them by the run's spool."""

    def setup(self, config: dict[str, Any]) -> None:
        """Start the workers."""
        job: TrialJob = config[JOB]
        self._folder = RunFolder(Path(job["run_folder"]))
        self._rungs = set(job.get("rungs", ()))
        self._spool = SpoolReader(self._folder.spool)
        self._step = 0
        self._stands_at: int | None = None
        self._training: Future[Ending] = Future()
        set_defaults()
        forget_gate(self._folder)
        if self._folder.stop.exists():
            # It was handed out, and all were asked to stop before it had its turn.
            self._training.set_result(Ending("stopped", 0, "asked to stop before it began"))
            return
        threading.Thread(target=self._run, args=(job,), name="training", daemon=True).start()

    def _run(self, job: TrialJob) -> None:
        started_ms = time.time_ns() // 1_000_000
        try:
            config = RunConfig.model_validate(job["config"])
            nested = NestedJob(trial=job, started_ms=started_ms)
            self._training.set_result(run_workers(config, self._folder, started_ms, train_trial, nested))
        except BaseException as error:  # noqa: BLE001  (raised where the result is asked for)
            self._training.set_exception(error)

    def step(self) -> dict[str, Any]:
        """What has happened in the last moment. Tune asks again after a rung if the trial goes on."""
        if self._stands_at is not None and open_gate(self._folder, self._stands_at):
            # Once: after a restart or a rewind it comes again.
            self._rungs.remove(self._stands_at)
            self._stands_at = None
        wait([self._training], timeout=_POLL_S)
        # Before reading: so that nothing is left to be read of a trial that has ended.
        over = self._training.done()
        for record in self._spool.read():
            if record.kind == TRAIN:
                self._step = record.step
        if (rung := self._rung()) is not None and rung[0] != self._stands_at:
            self._stands_at, loss = rung
            return trial_result(Progress(self._stands_at, rung_loss=loss))
        if over:
            ending = self._training.result()
            # Of a trial whose workers failed for good the ending knows no step.
            return trial_result(Progress(max(ending.step, self._step), ending))
        return trial_result(Progress(self._step))

    def cleanup(self) -> None:
        """End the workers in order, at their rung or at the next step: they outlive this actor, and hold their CPUs."""
        end = time.monotonic() + _END_S
        while not self._training.done() and time.monotonic() < end:
            # Both: workers that stood at the rung may have begun again from a checkpoint behind it.
            if (rung := self._rung()) is not None:
                close_gate(self._folder, rung[0])
            with suppress(OSError):  # no room on the disk: again in a moment
                self._folder.stop.touch()
            wait([self._training], timeout=_POLL_S)

    def _rung(self) -> tuple[int, float] | None:
        """The rung at which the workers wait, with their loss."""
        rung = knocked(self._folder)
        return rung if rung is not None and rung[0] in self._rungs else None
