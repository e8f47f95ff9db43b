"""What a sweep tells MLflow of its trials, and what it remembers of them; the trials run in this process."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Run

from infra.cli import main
from pipelines import tracking
from pipelines.errors import UserError
from pipelines.notes import read_notes
from pipelines.outcome import Ending
from pipelines.prepare import prepare
from pipelines.run_folder import RunFolder, read_json, write_json
from pipelines.spool import span_ms
from pipelines.tracking_store import TrackingStore, local_database, open_store
from tests.home import home_at
from tests.pipelines.mlflow_server import Server, wait_until
from tests.pipelines.small_run import SETTINGS
from tests.tuning.sweep_file import plan_of
from tuning.sweep_journal import Ended, Rung, SweepJournal
from tuning.sweep_loading import SweepPlan, trial_config
from tuning.sweep_outcome import conclude_sweep
from tuning.sweep_queue import SweepQueue
from tuning.sweep_run import JOURNAL, SweepRun
from tuning.sweep_trials import SweepTrials
from tuning.trial_rank import TrialJob, TrialRank

RATES = {"optimizer.lr": {"kind": "grid", "values": [1e-3, 1e-2]}}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingStore]:
    """A STEADYMOE_HOME with its database for all tests here; making one takes seconds."""
    with home_at(tmp_path_factory.mktemp("home")):
        yield open_store(local_database())


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


def test_a_trial_that_the_scheduler_ends_is_pruned_with_what_it_had_shown(tmp_path: Path, store: TrackingStore) -> None:
    asha = plan(tmp_path, scheduler={"kind": "asha", "first_rung": 6})
    with begun(asha, store) as (run, trials):
        given = trials.next()
        assert isinstance(given, tuple)
        name, job = given
        trials.started(name)
        rank = TrialRank(0)
        rank.begin(job)
        progress = rank.advance(1000)
        assert (progress.step, progress.ending) == (6, None)
        assert progress.rung_loss is not None
        trials.at_rung(Rung(name, 6, progress.rung_loss, goes_on=False))
        rank.close()
        other = run_next(trials)
        assert trials.next() == "end"
    found = in_mlflow(store, run)
    assert {one: found[one].info.status for one in found} == {name: "KILLED", other: "FINISHED"}
    pruned = found[name].data
    assert (pruned.tags["outcome"], pruned.tags["diverged"]) == ("pruned", "false")
    assert pruned.metrics["sweep/objective"] == pruned.metrics["sweep/val_loss"] == progress.rung_loss
    assert pruned.metrics["sweep/steps"] == 6
    assert pruned.metrics["sweep/max_vio_global"] == pruned.metrics["moe/max_vio_global"]
    assert "step 6" in pruned.tags["mlflow.note.content"]


def test_a_nested_trial_that_was_asked_to_stop_saves_and_goes_on_from_there(
    tmp_path: Path, store: TrackingStore
) -> None:
    nested = plan(tmp_path, nested=True)
    with begun(nested, store) as (run, trials):
        given = trials.next()
        assert isinstance(given, tuple)
        name, job = given
        trials.started(name)
        rank = TrialRank(0)
        rank.begin(job)
        assert rank.advance(4).step == 4
        trials.save_and_stop()
        assert trials.next() == "end"
        ending = rank.advance(1000).ending
        assert ending == Ending("stopped", 5, "asked to stop at step 5")
        trials.ended(name, ending)
    assert in_mlflow(store, run)[name].info.status == "KILLED"
    resumed = SweepRun.reopen(nested.config, store, run.folder, "digest")
    with resumed:
        trials = trials_of(nested, resumed, store)
        assert run_next(trials) == name
        folder = RunFolder(Path(job["run_folder"]))
        assert "training goes on after step 5" in [note.text for note in read_notes(folder.notes)]
        trials.close()
    assert in_mlflow(store, run)[name].info.status == "FINISHED"


def test_a_trial_that_was_handed_out_as_all_were_asked_to_stop_is_asked_when_it_is_seen(
    tmp_path: Path, store: TrackingStore
) -> None:
    with begun(plan(tmp_path, nested=True), store) as (_, trials):
        first = trials.next()
        trials.save_and_stop()
        assert isinstance(first, tuple)
        name, job = first
        stop = RunFolder(Path(job["run_folder"])).stop
        assert stop.exists()  # although the run has no folder of its own yet
        stop.unlink()
        trials.advanced(name, 0)
        assert stop.exists()


def test_what_a_driver_was_killed_before_it_could_tell_is_told_when_the_sweep_goes_on(
    tmp_path: Path, store: TrackingStore
) -> None:
    two = plan(tmp_path)
    with begun(two, store) as (run, trials):
        name = run_next(trials)
        trials.close()
        # As a kill between the journal and MLflow leaves it.
        RunFolder(Path(run.journal.trials[name].begun.folder)).ending.unlink()
        store.client.update_run(in_mlflow(store, run)[name].info.run_id, status="RUNNING")
        run.journal = SweepJournal.read(run.folder.path / JOURNAL)
        again = trials_of(two, run, store)
        other = run_next(again)
        assert again.next() == "end"
        again.close()
        found = in_mlflow(store, run)
    assert {one: found[one].info.status for one in found} == {name: "FINISHED", other: "FINISHED"}
    ended = run.journal.trials[name].ended
    assert ended is not None
    assert found[name].data.metrics["sweep/val_loss"] == ended.measures["val_loss"]
    assert found[name].data.tags["outcome"] == "finished"
    span = span_ms(RunFolder(Path(run.journal.trials[name].begun.folder)).spool)
    assert span is not None
    assert found[name].info.end_time == span[1]


WEIGHT_DECAYS = {"optimizer.weight_decay": {"kind": "grid", "values": [0.0, 0.1, 0.2, 0.3]}}


def fail_next(trials: SweepTrials) -> str:
    """The actors of the next trial die for good; its name."""
    given = trials.next()
    assert isinstance(given, tuple)
    trials.started(given[0])
    assert trials.failure is None
    trials.failed(given[0], "its actors died")
    return given[0]


def test_three_trials_in_a_row_that_fail_for_reasons_of_the_machine_end_the_sweep(
    tmp_path: Path, store: TrackingStore
) -> None:
    six = plan(tmp_path, space={"optimizer.lr": {"kind": "grid", "values": [n / 1000 for n in range(1, 7)]}})
    with begun(six, store) as (run, trials):
        fail_next(trials)
        finished = run_next(trials)
        names = [fail_next(trials) for _ in range(3)]
        assert str(trials.failure) == f"trial {names[-1]} failed: its actors died"
    found = in_mlflow(store, run)
    assert {found[name].info.status for name in names} == {"FAILED"}
    assert {found[name].data.tags["outcome"] for name in names} == {"failed"}
    assert found[finished].data.tags["outcome"] == "finished"


def test_trials_that_failed_are_taken_up_again_when_the_sweep_goes_on(tmp_path: Path, store: TrackingStore) -> None:
    four = plan(tmp_path, space=WEIGHT_DECAYS)
    with begun(four, store) as (run, trials):
        names = [fail_next(trials) for _ in range(3)]
        assert trials.failure is not None
    resumed = SweepRun.reopen(four.config, store, run.folder, "digest")
    with resumed:
        again = trials_of(four, resumed, store)
        assert [run_next(again) for _ in range(3)] == names
        assert again.failure is None
        last = run_next(again)
        assert again.next() == "end"
        again.close()
    found = in_mlflow(store, run)
    assert sorted(found) == sorted([*names, last])
    assert {trial.info.status for trial in found.values()} == {"FINISHED"}
    assert {trial.data.tags["outcome"] for trial in found.values()} == {"finished"}


def test_trials_that_fail_whenever_they_are_begun_do_not_end_a_sweep_that_goes_on(
    tmp_path: Path, store: TrackingStore
) -> None:
    six = plan(tmp_path, space={"optimizer.lr": {"kind": "grid", "values": [n / 1000 for n in range(1, 7)]}})
    with begun(six, store) as (run, trials):
        failed = []
        for _ in range(2):
            failed.append(fail_next(trials))
            run_next(trials)
        failed.append(fail_next(trials))
    resumed = SweepRun.reopen(six.config, store, run.folder, "digest")
    with resumed:
        again = trials_of(six, resumed, store)
        # No more at a time than ever: the third waits.
        both = [again.next(), again.next()]
        assert again.next() == "wait"
        for given in both:
            assert isinstance(given, tuple)
            again.started(given[0])
            again.failed(given[0], "its actors died")
        assert [given[0] for given in both] == failed[:2]
        assert fail_next(again) == failed[2]
        run_next(again)
        assert again.failure is None
        assert again.next() == "end"
        again.close()
    outcomes = [trial.ended.outcome for trial in resumed.journal.trials.values() if trial.ended]
    assert (outcomes.count("failed"), outcomes.count("finished")) == (3, 3)


def test_failed_trials_that_were_not_begun_again_stay_as_they_ended(tmp_path: Path, store: TrackingStore) -> None:
    with begun(plan(tmp_path), store) as (run, trials):
        name = fail_next(trials)
    resumed = SweepRun.reopen(plan(tmp_path).config, store, run.folder, "digest")
    with resumed:
        trials_of(plan(tmp_path), resumed, store).close()
    ended = SweepJournal.read(run.folder.path / JOURNAL).trials[name].ended
    assert ended is not None
    assert ended.outcome == "failed"
    assert in_mlflow(store, run)[name].info.status == "FAILED"


def test_a_config_that_training_cannot_use_is_a_failed_trial_and_the_others_go_on(
    tmp_path: Path, store: TrackingStore
) -> None:
    space = {"model.init.std": {"kind": "grid", "values": [0.02, 1.0e38]}}
    with begun(plan(tmp_path, space=space), store) as (run, trials):
        names = [run_next(trials), run_next(trials)]
        assert trials.next() == "end"
        assert trials.failure is None
    outcomes = {trial.begun.values["model.init.std"]: trial.ended for trial in run.journal.trials.values()}
    assert {value: ended.outcome for value, ended in outcomes.items() if isinstance(ended, Ended)} == {
        0.02: "finished",
        1.0e38: "failed",
    }
    assert {found.info.status for found in in_mlflow(store, run).values()} == {"FINISHED", "FAILED"}
    assert sorted(in_mlflow(store, run)) == sorted(names)
    refused = outcomes[1.0e38]
    assert isinstance(refused, Ended)
    assert "before the first step" in str(refused.reason)
    assert not isinstance(trials.failure, UserError)


def test_a_sweep_with_a_trial_that_failed_ends_with_the_others(tmp_path: Path, store: TrackingStore) -> None:
    space = {"model.init.std": {"kind": "grid", "values": [0.02, 0.03, 1.0e38]}}
    three = plan(tmp_path, space=space)
    with begun(three, store) as (run, trials):
        for _ in range(3):
            run_next(trials)
        trials.close()
        outcome = conclude_sweep(three, run)
    assert [one.outcome for one in outcome.order] == ["finished", "finished", "failed"]
    assert outcome.best is outcome.order[0]
    assert outcome.best_file.exists()
    assert len(outcome.findings) >= 1
    page = (run.folder.figures / "compare.html").read_text(encoding="utf-8")
    assert "0.03" in page
    assert "1e+38" not in page


def test_a_larger_budget_takes_the_search_up_again_after_the_final(tmp_path: Path, store: TrackingStore) -> None:
    space = {"optimizer.lr": {"kind": "log_uniform", "low": 1e-3, "high": 1e-2}}
    confirm = {"top": 2, "seeds": 2}
    changes = {"space": space, "searcher": {"kind": "random"}, "confirm": confirm}
    two = plan(tmp_path, **changes, budget={"trials": 2})
    with begun(two, store) as (run, trials):
        first = [run_next(trials) for _ in range(4)]
        assert trials.next() == "end"
        trials.close()
        three = plan(tmp_path, **changes, budget={"trials": 3})
        again = trials_of(three, run, store)
        more = run_next(again)
        assert run.journal.trials[more].begun.phase == "search"
        while isinstance(given := again.next(), tuple):
            again.started(given[0])
            assert run.journal.trials[given[0]].begun.phase == "final"
            again.failed(given[0], "not run here")
        assert given == "end"
        again.close()
    assert more not in first


def test_a_trial_that_an_earlier_driver_left_and_nobody_took_up_is_not_left_running(
    tmp_path: Path, store: TrackingStore
) -> None:
    two = plan(tmp_path)
    with begun(two, store) as (run, trials):
        given = trials.next()
        assert isinstance(given, tuple)
        name, _ = given
        trials.started(name)
        trials.close()
        folder = RunFolder(Path(run.journal.trials[name].begun.folder))
        folder.ending.unlink()
        store.client.update_run(in_mlflow(store, run)[name].info.run_id, status="RUNNING")
        trials_of(two, run, store).close()
        assert in_mlflow(store, run)[name].info.status == "KILLED"


def test_deliver_takes_the_trials_of_a_sweep_along(
    tmp_path: Path, store: TrackingStore, capsys: pytest.CaptureFixture[str]
) -> None:
    with begun(plan(tmp_path), store) as (run, trials):
        name, other = run_next(trials), run_next(trials)
    # As a server leaves it that was away at the trial's end.
    folder = RunFolder(Path(run.journal.trials[name].begun.folder))
    write_json(folder.delivered, {**read_json(folder.delivered), "ended": False})
    store.client.update_run(folder.info.id, status="RUNNING")
    assert main(["deliver", run.info.id]) == 0
    assert capsys.readouterr().out == f"MLflow has everything that run {run.info.name} and 1 of its trials recorded.\n"
    assert {one: found.info.status for one, found in in_mlflow(store, run).items()} == {
        name: "FINISHED",
        other: "FINISHED",
    }
    # One that began while the server was away is no run, and only the sweep knows what to make of it.
    folder.path.joinpath("run.json").rename(tmp_path / "run.json")
    assert main(["deliver", run.info.id]) == 2
    assert f"steadymoe sweep --resume {run.info.name}" in capsys.readouterr().err


@pytest.mark.slow
def test_a_server_that_comes_back_is_told_of_the_trials_that_it_missed(
    tmp_path: Path, store: TrackingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, two = Server(tmp_path / "server.db", tmp_path / "server.log"), plan(tmp_path)
    server.start()
    served = open_store(server.uri)
    try:
        with begun(two, served) as (run, trials):
            # MLflow knows the first one's beginning, and nothing of the second.
            for number in range(2):
                given = trials.next()
                assert isinstance(given, tuple)
                trials.started(given[0])
                if number == 0:
                    wait_until(lambda: len(in_mlflow(served, run)) == 1)
                    server.kill()
                    monkeypatch.setattr(tracking, "FINISH_TIMEOUT_S", 1.0)
                train(trials, *given)
            wait_until(lambda: len(trials.untold) == 2)
            server.start()
            monkeypatch.undo()
            trials.close()
            assert trials.untold == []
            found = in_mlflow(served, run)
            assert {one.info.status for one in found.values()} == {"FINISHED"}
            assert {len(losses(served, one)) for one in found.values()} == {12}
            # Told late, but of what was then.
            late = [trial.begun for trial in run.journal.trials.values()][1]
            span = span_ms(RunFolder(Path(late.folder)).spool)
            assert (found[late.name].info.start_time, found[late.name].info.end_time) == span
    finally:
        server.kill()


def losses(store: TrackingStore, run: Run) -> list[int]:
    return [point.step for point in store.client.get_metric_history(run.info.run_id, "train/loss")]
