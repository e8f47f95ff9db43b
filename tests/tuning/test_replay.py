"""The replay command as a user meets it: a run with a spike, real Tune trials, a real MLflow database."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from infra.cli import main
from pipelines.run_folder import RunFolder, replay_folders, run_folders
from pipelines.spike_event import read_events
from pipelines.views import REPLAYS
from tests.home import home_at
from tests.pipelines.driver import Driver, folders, run_steadymoe, sets, steps_of
from tests.pipelines.mlflow_server import wait_until
from tests.pipelines.small_run import metrics_of

pytestmark = pytest.mark.slow

# Step 51 is hit, and the loss of its four sequences is 5.2 deviations above the others.
SPIKY = sets(
    *("schedule.steps=70", "schedule.warmup_steps=40", "checkpoint.every_steps=15", "validation.every_steps=30"),
    *("seed=4", "data.global_batch_size=4", "stability.clip.kind=none", "detector.act=4.8"),
    *("faults=[{kind: corrupted_batches, share: 0.04, from_step: 35}]", "tracking.run_name=spiky"),
)
WITH = [word for name in ("tight-clip", "half-lr", "anticipate") for word in ("--with", name)]
ARMS = ("as-it-was", "tight-clip", "half-lr", "anticipate")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A STEADYMOE_HOME with a run that has had a spike."""
    with home_at(tmp_path_factory.mktemp("home")) as path:
        run_steadymoe(path, "train", "micro", *SPIKY)
        assert [event.id for event in read_events(folders()["spiky"].events)] == ["loss-000051"]
        yield path


def client_of(home: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{home / 'mlflow.db'}")


def replay_named(name: str) -> RunFolder:
    return next(folder for folder in replay_folders() if folder.info.name == name)


def trials_of(home: Path, replay: RunFolder) -> dict[str, Run]:
    parent = f"tags.`mlflow.parentRunId` = '{replay.info.id}'"
    found = client_of(home).search_runs([replay.info.experiment_id], parent)
    return {str(run.data.tags["arm"]): run for run in found}


def test_a_replay_repeats_the_spike_and_says_what_the_treatments_make_of_it(home: Path) -> None:
    done = run_steadymoe(home, "replay", "spiky", "loss-000051", *WITH, "--after", "9")
    assert "Traceback" not in done.stdout + done.stderr
    assert "from step-00000045: steps 46 to 60 under 4 treatments" in done.stdout
    assert "reproduced: loss and gradient norm of 6 steps are the run's, bit for bit" in done.stdout
    replay = replay_named("loss-000051-replay-1")
    parent = client_of(home).get_run(replay.info.id)
    assert (parent.info.status, parent.data.tags["role"]) == ("FINISHED", "replay")
    assert (parent.data.metrics["replay/reproduced"], parent.data.metrics["replay/treatments"]) == (1, 4)
    assert parent.data.tags["replay.run"] == "spiky"
    artifacts = {artifact.path for artifact in client_of(home).list_artifacts(replay.info.id, "figures")}
    assert artifacts == {"figures/report.md", "figures/replay.png", "figures/results.json"}

    trials = trials_of(home, replay)
    assert trials.keys() == set(ARMS)
    assert {run.info.status for run in trials.values()} == {"FINISHED"}
    run = metrics_of(folders()["spiky"].path)
    by_arm = {arm: metrics_of(RunFolder(next(home.glob(f"runs/{replay.info.id}-{arm}"))).path) for arm in ARMS}
    for steps in by_arm.values():
        assert list(steps) == list(range(46, 61))
        assert steps[46]["train/loss"] == run[46]["train/loss"]
    plain = by_arm["as-it-was"]
    for step in range(46, 52):
        for metric in ("train/loss", "train/grad_norm", "spike/score_loss", "moe/max_vio_batch"):
            assert plain[step][metric] == run[step][metric]
    assert plain[52]["train/loss"] != run[52]["train/loss"]  # the run had refused the update
    assert by_arm["half-lr"][46]["train/lr"] == run[46]["train/lr"] / 2
    assert by_arm["tight-clip"][51]["train/clipped"] == 1
    assert by_arm["anticipate"][51]["moe/anticipation_lag"] == 4

    table = json.loads((replay.figures / "results.json").read_text())
    rows = {row[0]: dict(zip(table["columns"], row, strict=True)) for row in table["data"]}
    assert list(rows) == list(ARMS)
    assert rows["as-it-was"]["score"] == run[51]["spike/score_loss"]
    assert (rows["as-it-was"]["verdict"], rows["as-it-was"]["cost"]) == ("same", 0.0)
    for arm, row in rows.items():
        assert row["val_loss"] == trials[arm].data.metrics["val/loss"]
        assert {chart.title for section in REPLAYS.sections for chart in section.charts} <= trials[
            arm
        ].data.metrics.keys()
    # The run keeps its own checkpoints, and the trials have none that MLflow would list beside them.
    models = client_of(home).search_logged_models([replay.info.experiment_id])
    assert {model.source_run_id for model in models} == {folders()["spiky"].info.id}


def test_a_setting_that_changes_bits_is_named_as_the_reason(home: Path) -> None:
    done = run_steadymoe(
        home, "replay", "spiky", "1", "--with", "half-lr", "--after", "0", "--set", "optimizer.beta2=0.9"
    )
    assert "not reproduced: at step 47 train/loss is " in done.stdout
    assert "What is known to be different: --set changes optimizer.beta2" in done.stdout
    assert client_of(home).get_run(replay_named("loss-000051-replay-2").info.id).data.metrics["replay/reproduced"] == 0


def test_a_replay_on_two_expert_parallel_workers_repeats_the_spike_bit_for_bit(home: Path) -> None:
    """Trials with two ranks each, which take up the shards of both workers."""
    pair = sets(
        *("parallel.workers=2", "parallel.expert_parallel=2", "schedule.steps=190", "schedule.warmup_steps=10"),
        *("optimizer.lr=3e-3", "data.global_batch_size=32", "checkpoint.every_steps=35", "validation.every_steps=95"),
        # By then the model knows enough of text to be surprised.
        *("tracking.run_name=pair", "faults=[{kind: corrupted_batch, step: 182, content: shuffled_tokens}]"),
    )
    run_steadymoe(home, "train", "micro", *pair)
    (event,) = read_events(folders()["pair"].events)
    assert (event.step, event.kind, event.action) == (182, "loss", "skip_step")
    done = run_steadymoe(home, "replay", "pair", event.id, "--with", "skip-samples", "--after", "5")
    assert "from step-00000175: steps 176 to 187 under 2 treatments" in done.stdout
    assert "reproduced: loss and gradient norm of 7 steps are the run's, bit for bit" in done.stdout
    replay = replay_named(f"{event.id}-replay-1")
    assert {run.info.status for run in trials_of(home, replay).values()} == {"FINISHED"}
    run = metrics_of(folders()["pair"].path)
    by_arm = {
        arm: metrics_of(RunFolder(next(home.glob(f"runs/{replay.info.id}-{arm}"))).path)
        for arm in ("as-it-was", "skip-samples")
    }
    for step in range(176, 183):
        for metric in ("train/loss", "train/grad_norm", "spike/score_loss", "moe/max_vio_batch"):
            assert by_arm["as-it-was"][step][metric] == run[step][metric]
    assert by_arm["skip-samples"][181]["train/loss"] == run[181]["train/loss"]
    assert by_arm["skip-samples"][182]["spike/score_loss"] < 6 < run[182]["spike/score_loss"]


def test_an_interrupted_replay_ends_as_killed_with_130(home: Path) -> None:
    known = {folder.path for folder in replay_folders()}
    slow = ("--after", "19", "--set", "monitors.every_steps=1")
    with Driver(home, "replay", "spiky", "1", *slow) as driver:
        wait_until(lambda: any(steps_of(run) >= 46 for run in run_folders() if _is_trial_of_another(run, known)))
        driver.interrupt(signal.SIGINT)
        assert driver.wait() == 130, driver.output()
        assert "Traceback" not in driver.output()
    (replay,) = (folder for folder in replay_folders() if folder.path not in known)
    assert client_of(home).get_run(replay.info.id).info.status == "KILLED"
    assert {run.info.status for run in trials_of(home, replay).values()} <= {"FINISHED", "KILLED"}


def _is_trial_of_another(run: RunFolder, known: set[Path]) -> bool:
    return run.info.parent is not None and run.info.parent not in {path.name for path in known}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nosuch", "1"), "run nosuch: no run has this id or name"),
        (("spiky", "loss-000052"), "event loss-000052: run spiky has no such event; did you mean loss-000051?"),
        (("spiky", "1", "--with", "prayer"), "--with prayer: no such treatment; there are as-it-was, skip-samples"),
    ],
)
@pytest.mark.usefixtures("home")
def test_wrong_input_is_answered_by_one_line(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
