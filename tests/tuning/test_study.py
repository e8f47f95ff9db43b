"""The study command as a user meets it: real Tune trials, a real MLflow database, interruptions and real kills."""

import json
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

from infra.cli import main
from pipelines.home import runs_dir
from pipelines.run_folder import RunFolder, study_folders
from pipelines.run_lock import is_written_to
from tests.home import home_at
from tests.pipelines.driver import Driver, run_steadymoe, sets, steps_of
from tests.pipelines.mlflow_server import Server, wait_until
from tuning.recording import read_series, series_file
from tuning.results import TrialKey
from tuning.series import Series
from tuning.study_run import find_study, read_trials

STEPS = 200
SETTINGS = sets(
    f"schedule.steps={STEPS}", f"validation.every_steps={STEPS}", "checkpoint.every_steps=0", "checkpoint.at_end=false"
)
KEYS = {TrialKey(seed, arm) for seed in (0, 1) for arm in ("slow", "fast")}
STUDY = {
    "title": "Learning rate",
    "question": "Does a model learn faster at a higher rate?",
    "base": ["micro"],
    "arms": {
        "slow": {"says": "a rate of 1e-4", "config": {"optimizer": {"lr": 1e-4}}},
        "fast": {"says": "a rate of 3e-3", "config": {"optimizer": {"lr": 3e-3}}},
    },
    "blocks": 2,
    "budget_minutes": 7,
    "shown": ["val_loss", "max_vio_late"],
    "claims": [
        {
            "name": "rate",
            "says": "A higher rate ends lower.",
            "conditions": [
                {
                    "left": {"arm": "fast", "measure": "val_loss"},
                    "relation": "below",
                    "right": {"arm": "slow", "measure": "val_loss"},
                }
            ],
        }
    ],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A STEADYMOE_HOME for all studies, with the file of one in it."""
    with home_at(tmp_path_factory.mktemp("home")) as path:
        (path / "tiny.yaml").write_text(yaml.safe_dump(STUDY, sort_keys=False))
        yield path


@pytest.fixture(scope="module")
def whole(home: Path) -> RunFolder:
    """A study that nothing disturbs, with what it found in ``findings.md``."""
    findings = home / "findings.md"
    findings.write_text("# Findings\n\nWritten by hand.\n")
    done = run_steadymoe(home, "study", str(home / "tiny.yaml"), *SETTINGS, "--findings", str(findings))
    assert "Traceback" not in done.stdout + done.stderr
    return find_study("tiny-1")


def client_of(home: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{home / 'mlflow.db'}")


def trials_of(client: MlflowClient, study: RunFolder) -> list[Run]:
    """What MLflow has of a study's trials, whatever became of them."""
    parent = f"tags.`mlflow.parentRunId` = '{study.info.id}'"
    found: list[Run] = list(client.search_runs([study.info.experiment_id], parent))
    return found


def results_of(study: RunFolder) -> list[dict[str, Any]]:
    """The table of results, but for what measures time."""
    table = json.loads((study.figures / "results.json").read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    return [{name: value for name, value in row.items() if name not in ("step_ms", "train_seconds")} for row in rows]


def series_of(study: RunFolder) -> dict[TrialKey, Series]:
    """But for what measures time."""
    found = {record.key: read_series(RunFolder(Path(record.folder))) for record in read_trials(study)}
    return {key: replace(s, train={n: v for n, v in s.train.items() if "second" not in n}) for key, s in found.items()}


def at_work(study: RunFolder) -> list[RunFolder]:
    """Trials that are on their way."""
    trials = [RunFolder(path) for path in runs_dir().glob(f"{study.info.id}-*")]
    return [trial for trial in trials if steps_of(trial) >= 20 and not series_file(trial).exists()]


def exists(study: str) -> bool:
    return any(
        json.loads(path.read_text())["name"] == study for path in (runs_dir().parent / "studies").glob("*/run.json")
    )


@pytest.mark.slow
def test_a_study_is_whole_in_mlflow_and_in_its_findings(home: Path, whole: RunFolder) -> None:
    client = client_of(home)
    parent = client.get_run(whole.info.id)
    assert (parent.info.status, parent.data.tags["role"]) == ("FINISHED", "study")
    assert parent.data.metrics["study/blocks"] == 2
    pictures = {artifact.path for artifact in client.list_artifacts(whole.info.id, "figures")}
    assert pictures == {"figures/report.md", "figures/study.png", "figures/results.json"}
    trials = trials_of(client, whole)
    assert {TrialKey(int(t.data.params["seed"]), t.data.tags["arm"]) for t in trials} == KEYS
    measured = {t.info.run_name: t.data.metrics["study/val_loss"] for t in trials}
    for trial in trials:
        assert (trial.info.status, trial.data.tags["role"], trial.data.tags["study"]) == ("FINISHED", "study", "tiny-1")
        assert trial.data.params["optimizer.lr"] == ("0.0001" if trial.data.tags["arm"] == "slow" else "0.003")
        assert [p.step for p in client.get_metric_history(trial.info.run_id, "train/loss")] == list(range(1, STEPS + 1))
        assert trial.data.metrics["study/val_loss"] == pytest.approx(trial.data.metrics["val/loss"], rel=1e-5)
    table = json.loads((whole.figures / "results.json").read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert {f"{row['arm']}-s{row['seed']}": row["val_loss"] for row in rows} == measured
    assert all(measured[f"fast-s{seed}"] < measured[f"slow-s{seed}"] for seed in (0, 1))
    findings = (home / "findings.md").read_text()
    assert findings.startswith("# Findings\n\nWritten by hand.\n")
    assert findings.count("<!-- study tiny -->") == 1
    assert "A higher rate ends lower." in findings
    assert (home / "findings-tiny.png").read_bytes() == (whole.figures / "study.png").read_bytes()


@pytest.mark.slow
def test_a_study_that_is_interrupted_and_killed_ends_as_an_undisturbed_one(home: Path, whole: RunFolder) -> None:
    client = client_of(home)
    with Driver(home, "study", str(home / "tiny.yaml"), *SETTINGS) as driver:
        wait_until(lambda: exists("tiny-2"))
        study = find_study("tiny-2")
        wait_until(lambda: len(read_trials(study)) > 0 and len(at_work(study)) > 0)
        driver.interrupt(signal.SIGINT)
        assert driver.wait() == 130, driver.output()
        assert "Traceback" not in driver.output()
        assert "To go on: steadymoe study --resume tiny-2" in driver.output()
    done = read_trials(study)
    assert 0 < len(done) < 4
    assert client.get_run(study.info.id).info.status == "KILLED"
    statuses = [trial.info.status for trial in trials_of(client, study)]
    assert statuses.count("FINISHED") == len(done)
    assert set(statuses) == {"FINISHED", "KILLED"}

    with Driver(home, "study", "--resume", "tiny-2") as driver:
        wait_until(lambda: any(is_written_to(trial) for trial in at_work(study)))
        started = driver.descendants()
        driver.process.kill()
        driver.wait()
        for process in started:
            if process.is_running():
                process.kill()
        psutil.wait_procs(started, timeout=60)
    assert client.get_run(study.info.id).info.status == "RUNNING"  # nobody was left to say otherwise

    findings = home / "findings.md"
    run_steadymoe(home, "study", "--resume", "tiny-2", "--budget-minutes", "9", "--findings", str(findings))
    assert client.get_run(study.info.id).info.status == "FINISHED"
    statuses = [trial.info.status for trial in trials_of(client, study)]
    assert statuses.count("FINISHED") == 4
    assert set(statuses) == {"FINISHED", "KILLED"}
    trials = read_trials(study)
    assert trials[: len(done)] == done
    assert len(trials) == 4
    assert series_of(study) == series_of(whole)
    assert results_of(study) == results_of(whole)
    # The section of the first study of this name is replaced, and so is its picture.
    assert findings.read_text().startswith("# Findings\n\nWritten by hand.\n")
    assert findings.read_text().count("<!-- study tiny -->") == 1
    assert (home / "findings-tiny.png").read_bytes() == (study.figures / "study.png").read_bytes()


@pytest.mark.slow
def test_a_study_whose_tracking_server_dies_has_all_its_results(home: Path, whole: RunFolder) -> None:
    name = f"tiny-{len(list(study_folders())) + 1}"
    server = Server(home / "server.db", home / "server.log")
    server.start()
    try:
        uri = ("--set", f"tracking.uri={server.uri}")
        with Driver(home, "study", str(home / "tiny.yaml"), *SETTINGS, *uri) as driver:
            wait_until(lambda: exists(name))
            study = find_study(name)
            wait_until(lambda: len(at_work(study)) > 0)
            server.kill()
            assert driver.wait() == 0, driver.output()
        output = driver.output()
        assert "MLflow could not be told of" in output
        assert f"of run {name} could not be delivered" in output
        assert f"steadymoe deliver {name}" in output
        assert series_of(study) == series_of(whole)
        assert results_of(study) == results_of(whole)
        server.start()
        run_steadymoe(home, "deliver", name)
        client = MlflowClient(server.uri)
        assert client.get_run(study.info.id).info.status == "FINISHED"
        assert len(client.list_artifacts(study.info.id, "figures")) == 3
    finally:
        server.kill()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nosuch",), "nosuch"),
        (("--resume", "nosuch"), "study nosuch: "),
        (("tiny.yaml", "--set", "schedule.steps=many"), "schedule.steps"),
        (("wrong.yaml",), "claims.0.conditions.0.left.arm: 'none' is none of the arms slow, fast"),
    ],
)
def test_wrong_input_is_answered_by_one_line(
    home: Path, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = yaml.safe_dump(STUDY, sort_keys=False).replace("arm: fast", "arm: none")
    (home / "wrong.yaml").write_text(wrong)
    given = [str(home / word) if word.endswith(".yaml") else word for word in words]
    assert main(["study", *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
