"""What a study tells MLflow of its trials, and what it remembers of them; the trials run in this process."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow.entities import Run

from pipelines.errors import UserError
from pipelines.prepare import prepare
from pipelines.tracking_store import TrackingStore
from tests.pipelines.small_run import SETTINGS
from tuning.blocks import Blocks
from tuning.results import TrialKey
from tuning.study_config import StudyConfig
from tuning.study_loading import trial_configs
from tuning.study_run import StudyRun, TrialRecord
from tuning.study_trials import StudyTrials
from tuning.trial_rank import TrialRank

CLAIM = {
    "name": "none",
    "says": "nothing",
    "conditions": [{"left": {"arm": "a", "measure": "val_loss"}, "relation": "below", "right": 9.0}],
}


def _study(**arm_b: object) -> StudyConfig:
    arms = {"a": {"says": "plain"}, "b": {"says": "other", "config": arm_b}}
    return StudyConfig.model_validate(
        {
            "title": "t",
            "question": "q?",
            "base": ["micro"],
            "settings": list(SETTINGS),
            "arms": arms,
            "blocks": 1,
            "shown": ["val_loss"],
            "claims": [CLAIM],
        }
    )


@contextmanager
def _begun(study: StudyConfig, store: TrackingStore) -> Iterator[tuple[StudyTrials, StudyRun, threading.Event]]:
    """A study's trials before the first one, and its run; both are ended afterwards."""
    stop = threading.Event()
    run = StudyRun.start(study, store, "tiny", "steadymoe", "digest")
    shards = prepare(trial_configs(study)[0].data)
    with run:
        trials = StudyTrials(study, run, Blocks(study, 1, 1.0), shards, store, stop, lambda result, seconds: None)
        try:
            yield trials, run, stop
        finally:
            trials.close()


def _run_all(trials: StudyTrials, stop: threading.Event) -> None:
    """In place of Tune."""
    rank = TrialRank(0)
    while not stop.is_set() and isinstance(given := trials.next(), tuple):
        name, job = given
        trials.started(name)
        rank.begin(job)
        ending = rank.advance(1000).ending
        assert ending is not None
        trials.ended(name, ending)


def _in_mlflow(store: TrackingStore, run: StudyRun) -> dict[str, Run]:
    found = store.client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run.info.id}'")
    return {str(trial.data.tags["arm"]): trial for trial in found}


@pytest.mark.parametrize(
    ("check", "why"),
    [pytest.param(True, "before the first step", marks=pytest.mark.slow), (False, "the first step's loss")],
)
def test_an_arm_that_cannot_be_trained_ends_the_study_and_is_the_one_that_failed(
    store: TrackingStore, check: bool, why: str
) -> None:
    with _begun(_study(model={"init": {"std": 1.0e38, "check": check}}), store) as (trials, run, stop):
        _run_all(trials, stop)
        assert isinstance(trials.failure, UserError)
        assert "trial b-s0: " in str(trials.failure)
        assert why in str(trials.failure)
    found = _in_mlflow(store, run)
    assert {arm: trial.info.status for arm, trial in found.items()} == {"a": "FINISHED", "b": "FAILED"}
    assert why in found["b"].data.tags["mlflow.note.content"]
    assert [record.key for record in run.trials] == [TrialKey(0, "a")]


@pytest.mark.parametrize(
    ("end", "status"),
    [(lambda trials, name: trials.failed(name, "its actors died"), "FAILED"), (lambda trials, name: None, "KILLED")],
)
def test_a_trial_that_was_begun_and_has_no_result_ends_as_what_it_is(
    store: TrackingStore, end: Callable[[StudyTrials, str], None], status: str
) -> None:
    with _begun(_study(), store) as (trials, run, stop):
        given = trials.next()
        assert isinstance(given, tuple)
        trials.started(given[0])
        end(trials, given[0])
        assert stop.is_set() == (status == "FAILED")
    assert [trial.info.status for trial in _in_mlflow(store, run).values()] == [status]


def test_a_trial_that_nobody_began_leaves_nothing(store: TrackingStore) -> None:
    with _begun(_study(), store) as (trials, run, _):
        given = trials.next()
        assert isinstance(given, tuple)
    assert _in_mlflow(store, run) == {}
    assert not Path(given[1]["run_folder"]).exists()


def test_a_record_that_a_kill_cut_short_costs_that_trial_alone(store: TrackingStore) -> None:
    records = [TrialRecord(TrialKey(seed, "a"), f"/runs/{seed}", "finished", 1.5) for seed in range(3)]
    with StudyRun.start(_study(), store, "tiny", "steadymoe", "digest") as run:
        run.record(records[0])
        run.record(records[1])
        file = run.folder.path / "trials.jsonl"
        file.write_bytes(file.read_bytes()[:-9])
        assert run.trials == records[:1]
        run.record(records[2])
        assert run.trials == [records[0], records[2]]


def test_a_divergence_is_a_result_and_a_failed_run(store: TrackingStore) -> None:
    with _begun(_study(optimizer={"lr": 1.0e30}, schedule={"warmup_steps": 0}), store) as (trials, run, stop):
        _run_all(trials, stop)
        assert trials.failure is None
    found = _in_mlflow(store, run)
    assert {arm: trial.info.status for arm, trial in found.items()} == {"a": "FINISHED", "b": "FAILED"}
    assert found["b"].data.metrics["study/diverged"] == 1
    assert found["a"].data.metrics["study/diverged"] == 0
    assert [record.outcome for record in run.trials] == ["finished", "diverged"]
    assert trials.untold == []
