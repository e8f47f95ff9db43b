"""What becomes of a sweep whose trials fail, and of those trials when it goes on."""

from pathlib import Path

from pipelines.errors import UserError
from pipelines.tracking_store import TrackingStore
from tests.tuning.sweep_scene import begun, in_mlflow, plan, run_next, trials_of
from tuning.sweep_journal import Ended, SweepJournal
from tuning.sweep_outcome import conclude_sweep
from tuning.sweep_run import JOURNAL, SweepRun
from tuning.sweep_trials import SweepTrials

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


def test_three_configs_that_training_cannot_use_and_nothing_else_end_the_sweep(
    tmp_path: Path, store: TrackingStore
) -> None:
    space = {"model.init.std": {"kind": "grid", "values": [1.0e38, 1.5e38, 2.0e38, 2.5e38]}}
    with begun(plan(tmp_path, space=space), store) as (_, trials):
        for _ in range(3):
            assert trials.failure is None
            run_next(trials)
        assert isinstance(trials.failure, UserError)
        assert "before the first step" in str(trials.failure)
