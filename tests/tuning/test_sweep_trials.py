"""What a sweep tells MLflow of its trials, and what it remembers of them; the trials run in this process."""

from pathlib import Path

import pytest
from mlflow.entities import Run

from infra.cli import main
from pipelines import tracking
from pipelines.notes import read_notes
from pipelines.outcome import Ending
from pipelines.run_folder import RunFolder, read_json, write_json
from pipelines.spool import span_ms
from pipelines.tracking_store import TrackingStore, open_store
from tests.pipelines.mlflow_server import Server, wait_until
from tests.tuning.sweep_scene import begun, in_mlflow, plan, run_next, train, trials_of
from tuning.sweep_journal import Rung, SweepJournal
from tuning.sweep_run import JOURNAL, SweepRun
from tuning.trial_rank import TrialRank


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
