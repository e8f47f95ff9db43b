"""Trials on Ray Tune: which, and who hears of them, is the caller's; Tune places, restarts and ends them."""

import os
import shutil
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from moe.config.trainer import ParallelConfig
from pipelines.outcome import Ending
from tuning.trial_rank import TrialJob

if TYPE_CHECKING:
    from ray.tune.schedulers import TrialScheduler

# Of Tune, read when it runs. Results and configs are kept by this project, and so are the signals of the process.
_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Only a result at a rung has the loss that schedulers look at.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    # Another layout of the tables that are switched off here.
    "RAY_AIR_NEW_OUTPUT": "0",
}
# A trial whose actors died is begun again so often.
_RESTARTS = 2


class TrialSource(ABC):
    """What there is to run. Called from one thread."""

    @abstractmethod
    def next(self) -> tuple[str, TrialJob] | Literal["wait", "end"]:
        """The name of another trial and what it is; ``wait`` while that is open, ``end`` after the last."""

    @abstractmethod
    def started(self, name: str) -> None:
        """A trial has its actors; also said again when it is restarted."""

    def advanced(self, name: str, step: int) -> None:
        """A trial has done so many steps. Most have no use for it."""
        return

    @abstractmethod
    def ended(self, name: str, ending: Ending) -> None:
        """A trial has come to its own end."""

    @abstractmethod
    def failed(self, name: str, reason: str) -> None:
        """A trial's actors failed for good."""


def run_trials(
    source: TrialSource,
    parallel: ParallelConfig,
    gpu: bool,
    slots: int,
    folder: Path,
    stop: threading.Event,
    make_scheduler: "Callable[[], TrialScheduler] | None" = None,
    at_once: int = 1,
    nested: bool = False,
) -> None:
    """Run the trials of ``source``, ``slots`` at a time, until there are none left or ``stop`` is set. Needs Ray.

    Trials that run when ``stop`` is set are left where they are: nobody is told of them. Tune's own files are in
    ``folder`` for the while, which every node of the cluster must see. A scheduler is made here, for it takes Ray; with
    one that compares trials in step, ``at_once`` of them must be there from the start. ``nested`` trials are Ray Train
    runs, each with processes of its own.
    """
    # As many wait for a slot as there are, so that none idles when several end at once.
    os.environ.update({**_ENVIRONMENT, "TUNE_MAX_PENDING_TRIALS_PG": str(max(slots, at_once))})
    from ray import tune

    from tuning import nested_trial, trial
    from tuning.tune_adapters import Reporter, Search, Stop, trial_name

    storage = folder / "tune"
    trainable, resources = (
        (nested_trial.NestedTrial, nested_trial.resources())
        if nested
        else (trial.TrainingTrial, trial.resources(parallel, gpu))
    )
    tuner = tune.Tuner(
        tune.with_resources(trainable, resources),
        tune_config=tune.TuneConfig(
            search_alg=Search(source),
            scheduler=make_scheduler() if make_scheduler is not None else None,
            num_samples=-1,
            reuse_actors=not nested,
            trial_name_creator=trial_name,
            trial_dirname_creator=trial_name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(storage),
            stop=Stop(stop),
            callbacks=[Reporter(source)],
            failure_config=tune.FailureConfig(max_failures=_RESTARTS),
            # The end of a trial is not its: see TrainingTrial.
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False, checkpoint_frequency=0),
            verbose=0,
        ),
    )
    tuner.fit()
    # Nothing in it that anybody needs: trials keep their state in their runs' folders, and the source keeps its own.
    shutil.rmtree(storage, ignore_errors=True)
