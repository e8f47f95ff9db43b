"""A sweep whose trials run in this process, in place of Tune."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlflow.entities import Run

from pipelines.prepare import prepare
from pipelines.tracking_store import TrackingStore
from tests.pipelines.small_run import SETTINGS
from tests.tuning.sweep_file import plan_of
from tuning.sweep_loading import SweepPlan, trial_config
from tuning.sweep_queue import SweepQueue
from tuning.sweep_run import SweepRun
from tuning.sweep_trials import SweepTrials
from tuning.trial_rank import TrialJob, TrialRank

RATES = {"optimizer.lr": {"kind": "grid", "values": [1e-3, 1e-2]}}


def plan(folder: Path, **changes: Any) -> SweepPlan:
    return plan_of(folder, {"config": {}, "settings": list(SETTINGS), "space": RATES, **changes})


@contextmanager
def begun(plan: SweepPlan, store: TrackingStore) -> Iterator[tuple[SweepRun, SweepTrials]]:
    """A sweep's run and its trials before the first one; both are ended afterwards."""
    run = SweepRun.start(plan.config, store, "tiny", "steadymoe-sweeps", "digest")
    with run:
        trials = trials_of(plan, run, store)
        try:
            yield run, trials
        finally:
            trials.close()


def trials_of(plan: SweepPlan, run: SweepRun, store: TrackingStore) -> SweepTrials:
    shards = prepare(trial_config(plan, plan.probe, plan.first_seed).data)
    queue = SweepQueue(plan, run.journal, 1, 1, 0.0)
    return SweepTrials(plan, run, queue, shards, store, threading.Event(), 2, {}, lambda label, ended: None)


def run_next(trials: SweepTrials) -> str:
    """Run the next trial to its end, in place of Tune; its name."""
    given = trials.next()
    assert isinstance(given, tuple)
    name, job = given
    trials.started(name)
    train(trials, name, job)
    return name


def train(trials: SweepTrials, name: str, job: TrialJob) -> None:
    """A trial from its first step to its end."""
    rank = TrialRank(0)
    rank.begin(job)
    while (progress := rank.advance(1000)).ending is None:
        assert progress.rung_loss is not None
    trials.ended(name, progress.ending)


def in_mlflow(store: TrackingStore, run: SweepRun) -> Mapping[str, Run]:
    found = store.client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run.info.id}'")
    return {str(trial.info.run_name): trial for trial in found}
