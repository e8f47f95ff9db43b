"""The sweep command as a user meets it: real Tune trials, a real MLflow database, real kills."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

from pipelines.run_folder import RunFolder, find_sweep
from pipelines.run_lock import is_written_to
from tests.home import home_at
from tests.pipelines.driver import Driver, folders, run_steadymoe, sets, steps_of
from tests.pipelines.mlflow_server import wait_until
from tuning.sweep_journal import SweepJournal, TrialState
from tuning.sweep_run import JOURNAL

STEPS = 60
PLAIN = (
    f"schedule.steps={STEPS}",
    f"validation.every_steps={STEPS}",
    "checkpoint.every_steps=0",
    "checkpoint.at_end=false",
)
SETTINGS = sets(*PLAIN)
SWEEP: dict[str, Any] = {
    "title": "Learning rate and clip",
    "question": "Which learning rate is best?",
    "base": ["micro"],
    "space": {
        "optimizer.lr": {"kind": "grid", "values": [1e-4, 1e-3, 5e-3, 1e-2]},
        "stability.clip": {"kind": "choice", "values": [{"kind": "none"}, {"kind": "global", "max_norm": 1.0}]},
    },
    "scheduler": {"kind": "asha", "first_rung": 15, "reduction": 2},
    "confirm": {"top": 2, "seeds": 2},
}


def write(home: Path, name: str, **changes: Any) -> str:
    path = home / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**SWEEP, **changes}, sort_keys=False))
    return str(path)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A STEADYMOE_HOME for all sweeps."""
    with home_at(tmp_path_factory.mktemp("home")) as path:
        yield path


def client_of(home: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{home / 'mlflow.db'}")


def trials_of(client: MlflowClient, sweep: RunFolder) -> list[Run]:
    """What MLflow has of a sweep's trials, whatever became of them."""
    parent = f"tags.`mlflow.parentRunId` = '{sweep.info.id}'"
    found: list[Run] = list(client.search_runs([sweep.info.experiment_id], parent))
    return found


def journal_of(sweep: RunFolder) -> SweepJournal:
    return SweepJournal.read(sweep.path / JOURNAL)


def check_tree(client: MlflowClient, sweep: RunFolder) -> None:
    """Every trial of the journal is one run of MLflow's, with the status, tags and figures of its end; no other is."""
    journal, runs = journal_of(sweep), trials_of(client, sweep)
    assert sorted(run.info.run_name for run in runs) == sorted(journal.trials)
    status = {"finished": "FINISHED", "pruned": "KILLED", "diverged": "FAILED"}
    for run in runs:
        trial = journal.trials[run.info.run_name]
        assert trial.ended is not None
        assert (run.info.status, run.data.tags["outcome"]) == (status[trial.ended.outcome], trial.ended.outcome)
        assert (run.data.tags["role"], run.data.tags["sweep"]) == ("sweep", sweep.info.name)
        assert run.data.params["optimizer.lr"] == json.dumps(trial.begun.values["optimizer.lr"])
        assert run.data.metrics["sweep/val_loss"] == pytest.approx(trial.ended.measures["val_loss"])
        steps = [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")]
        assert steps == list(range(1, trial.ended.step + 1))


@pytest.mark.slow
def test_a_sweep_prunes_confirms_and_writes_a_config_that_can_be_trained(home: Path) -> None:
    done = run_steadymoe(home, "sweep", write(home, "rates"), *SETTINGS)
    assert "Traceback" not in done.stdout + done.stderr
    sweep, client = find_sweep("rates-1"), client_of(home)
    journal = journal_of(sweep)
    search = [trial for trial in journal.trials.values() if trial.begun.phase == "search"]
    final = [trial for trial in journal.trials.values() if trial.begun.phase == "final"]
    assert len(search) == 8
    pruned = [trial for trial in search if trial.ended and trial.ended.outcome == "pruned"]
    assert pruned
    assert all(trial.step in (15, 30) for trial in pruned)
    assert len(final) == 2
    assert all(trial.begun.seed == 1 and trial.step == STEPS for trial in final)
    check_tree(client, sweep)
    parent = client.get_run(sweep.info.id)
    assert (parent.info.status, parent.data.tags["role"]) == ("FINISHED", "sweep")
    assert parent.data.metrics["sweep/trials"] == 10
    assert {
        "figures/compare.html",
        "figures/report.md",
        "figures/ranking.md",
        "figures/best.yaml",
        "figures/results.json",
    } <= {artifact.path for artifact in client.list_artifacts(sweep.info.id, "figures")}
    # The two of the final are the only ones with two seeds, and the best is the better one of them.
    means: dict[int, list[float]] = {}
    for trial in journal.trials.values():
        if trial.ended:
            means.setdefault(trial.begun.number, []).append(trial.ended.measures["val_loss"])
    pairs = {number: sum(losses) / 2 for number, losses in means.items() if len(losses) == 2}
    best = journal.trials[f"rates-1-{min(pairs, key=pairs.__getitem__):02d}"]
    text = (sweep.path / "best.yaml").read_text()
    content = yaml.safe_load(text)
    assert content["optimizer"]["lr"] == best.begun.values["optimizer.lr"]
    assert content["stability"]["clip"]["kind"] == best.begun.values["stability.clip"]["kind"]
    assert content["response"]["kind"] == "ladder"  # what a run has, and not what a trial has
    assert text.startswith("# The best configuration of sweep rates-1")
    run_steadymoe(home, "train", str(sweep.path / "best.yaml"), "--set", "tracking.run_name=best")
    trained = client.get_run(folders()["best"].info.id)
    assert trained.data.metrics["val/loss"] == pytest.approx(
        best.ended.measures["val_loss"] if best.ended else 0, rel=1e-5
    )


@pytest.mark.slow
def test_a_sweep_whose_driver_is_killed_twice_ends_with_the_same_trials(home: Path) -> None:
    six = {**SWEEP["space"], "optimizer.lr": {"kind": "grid", "values": [1e-4, 1e-3, 5e-3]}}
    plain = {"space": six, "scheduler": {"kind": "none"}, "confirm": None}
    run_steadymoe(home, "sweep", write(home, "undisturbed", **plain), *SETTINGS)
    client, file = client_of(home), write(home, "killed", **plain)
    for attempt, words in enumerate((("sweep", file, *SETTINGS), ("sweep", "--resume", "killed-1"))):
        with Driver(home, *words) as driver:
            wait_until(lambda: "killed-1" in names(home))
            sweep = find_sweep("killed-1")
            wait_until(lambda: len(ended(sweep)) >= 2 + 2 * attempt and bool(at_work(sweep)))  # noqa: B023
            kill(driver)
        assert client.get_run(sweep.info.id).info.status == "RUNNING"  # nobody was left to say otherwise
        known = {name: ended(sweep)[name] for name in ended(sweep)}
    run_steadymoe(home, "sweep", "--resume", "killed-1")
    whole = ended(find_sweep("undisturbed-1"))
    again = ended(sweep)
    assert {name: again[name] for name in known} == known
    assert {name.replace("killed", "undisturbed"): loss for name, loss in again.items()} == whole
    assert client.get_run(sweep.info.id).info.status == "FINISHED"
    check_tree(client, sweep)


def kill(driver: Driver) -> None:
    """Kill a driver and everything that it has started, as the loss of a machine would."""
    started = driver.descendants()
    driver.process.kill()
    driver.wait()
    for process in started:
        if process.is_running():
            process.kill()
    psutil.wait_procs(started, timeout=60)


def names(home: Path) -> set[str]:
    return {json.loads(path.read_text())["name"] for path in (home / "sweeps").glob("*/run.json")}


def ended(sweep: RunFolder) -> dict[str, float]:
    """The losses of the trials that are over, by name."""
    return {name: t.ended.measures["val_loss"] for name, t in journal_of(sweep).trials.items() if t.ended is not None}


def at_work(sweep: RunFolder) -> list[RunFolder]:
    trials = [RunFolder(Path(t.begun.folder)) for t in journal_of(sweep).trials.values() if t.ended is None]
    return [trial for trial in trials if 5 <= steps_of(trial) < STEPS - 10 and is_written_to(trial)]


@pytest.mark.slow
def test_a_sweep_of_trials_with_two_workers_ends_a_diverging_one_early_and_ranks_it_last(home: Path) -> None:
    space = {"optimizer.lr": {"kind": "grid", "values": [1e-3, 1e3, 3e-3]}}
    file = write(home, "pairs", space=space, scheduler={"kind": "none"}, confirm=None)
    done = run_steadymoe(home, "sweep", file, *sets(*PLAIN, "parallel.workers=2", "parallel.expert_parallel=2"))
    sweep = find_sweep("pairs-1")
    trials = journal_of(sweep).trials.values()
    assert "1 at a time with 2 worker(s)" in done.stdout
    for trial in trials:
        assert trial.ended is not None
        diverges = trial.begun.values["optimizer.lr"] == 1e3
        assert trial.ended.outcome == ("diverged" if diverges else "finished")
        assert trial.step < 20 if diverges else trial.step == STEPS
    check_tree(client_of(home), sweep)
    table = (sweep.figures / "ranking.md").read_text().splitlines()
    outcomes = [line.split("|")[2].strip() for line in table if line.startswith("| lr=")]
    assert outcomes == ["finished", "finished", "diverged"]
    runs = {run.info.run_name: run for run in trials_of(client_of(home), sweep)}
    assert all(
        runs[t.begun.name].data.tags["diverged"] == "true" for t in trials if t.ended and t.ended.outcome == "diverged"
    )


@pytest.mark.slow
def test_a_population_goes_on_from_the_checkpoints_of_its_best(home: Path) -> None:
    space = {"optimizer.lr": {"kind": "log_uniform", "low": 1e-5, "high": 1e-2}}
    file = write(
        home,
        "population",
        space=space,
        searcher={"kind": "random"},
        scheduler={"kind": "pbt", "interval_steps": 20},
        budget={"trials": 4},
        confirm=None,
    )
    run_steadymoe(home, "sweep", file, *SETTINGS)
    sweep = find_sweep("population-1")
    trials = journal_of(sweep).trials
    exploits = [exploit for trial in trials.values() for exploit in trial.exploits]
    assert {exploit.step for exploit in exploits} == {20, 40}
    client = client_of(home)
    runs = {run.info.run_name: run.info.run_id for run in trials_of(client, sweep)}
    for run in trials_of(client, sweep):
        told = run.data.tags.get("exploits", "")
        assert [f"from {one.donor}: " in told for one in trials[run.info.run_name].exploits] == [True] * (
            told.count("step ")
        )
    for exploit in exploits:
        # The next loss is that of the donor's weights on the same batch; the rate is the trial's own new one.
        own, donor = (client.get_metric_history(runs[name], "train/loss") for name in (exploit.name, exploit.donor))
        assert own[exploit.step].value == donor[exploit.step].value
        assert own[exploit.step - 1].value != donor[exploit.step - 1].value
        rates = [client.get_metric_history(runs[name], "train/lr") for name in (exploit.name, exploit.donor)]
        own_rate, donor_rate = (history[exploit.step].value for history in rates)
        value = value_at(trials[exploit.donor], exploit.step)
        assert own_rate / donor_rate == pytest.approx(exploit.values["optimizer.lr"] / value, rel=1e-4)
        assert [point.step for point in own] == list(range(1, STEPS + 1))


def value_at(trial: TrialState, step: int) -> float:
    """The rate that a trial of a population has after an exploit's step."""
    later = [exploit.values for exploit in trial.exploits if exploit.step <= step]
    return float((later or [trial.begun.values])[-1]["optimizer.lr"])


@pytest.mark.slow
def test_a_population_whose_driver_was_killed_meets_again_and_comes_to_its_end(home: Path) -> None:
    file = write(
        home,
        "resumed",
        space={"optimizer.lr": {"kind": "log_uniform", "low": 1e-5, "high": 1e-2}},
        searcher={"kind": "random"},
        scheduler={"kind": "pbt", "interval_steps": 10},
        budget={"trials": 4},
        confirm=None,
    )
    with Driver(home, "sweep", file, *SETTINGS) as driver:
        wait_until(lambda: "resumed-1" in names(home))
        sweep = find_sweep("resumed-1")
        wait_until(lambda: any(one.step >= 20 for t in journal_of(sweep).trials.values() for one in t.exploits))
        kill(driver)
    before = [one for trial in journal_of(sweep).trials.values() for one in trial.exploits]
    run_steadymoe(home, "sweep", "--resume", "resumed-1")
    trials = journal_of(sweep).trials.values()
    assert len(trials) == 4
    assert all(trial.step == STEPS for trial in trials)
    exploits = [one for trial in trials for one in trial.exploits]
    assert len(exploits) > len(before)
    assert max(one.step for one in exploits) > max(one.step for one in before)
    client = client_of(home)
    for run in trials_of(client, sweep):
        assert run.info.status == "FINISHED"
        assert [p.step for p in client.get_metric_history(run.info.run_id, "train/loss")] == list(range(1, STEPS + 1))
