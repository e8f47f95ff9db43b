"""The training command as a user meets it: real Ray Train workers, a real MLflow database, a real exit code."""

import re
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from mlflow import MlflowClient

from tests.home import home_at
from tests.pipelines.driver import folders, run_steadymoe, sets
from tests.pipelines.small_run import metrics_of

CONSTANT = "schedule.decay.kind=constant"
PAIR = ("parallel.workers=2", "parallel.expert_parallel=2", CONSTANT)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A STEADYMOE_HOME for all runs."""
    with home_at(tmp_path_factory.mktemp("home")) as path:
        yield path


@pytest.fixture(scope="module")
def pair(home: Path) -> CompletedProcess[str]:
    """The command of the run ``pair``, on two expert-parallel workers."""
    return run_steadymoe(home, "train", "micro", *sets(*PAIR, "tracking.run_name=pair"))


@pytest.fixture(scope="module")
def alone(home: Path) -> dict[int, dict[str, float]]:
    """The figures of the same run on one worker."""
    run_steadymoe(home, "train", "micro", *sets(CONSTANT, "tracking.run_name=alone"))
    return metrics_of(folders()["alone"].path)


def test_a_run_on_two_expert_parallel_workers_ends_finished_in_mlflow_with_all_its_figures(
    home: Path, pair: CompletedProcess[str]
) -> None:
    folder = folders()["pair"]
    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    run = client.get_run(folder.info.id)
    assert run.info.status == "FINISHED"
    assert run.data.params["parallel.expert_parallel"] == "2"
    assert run.data.params["model.vocab_size"] == "257"
    assert run.data.tags["diverged"] == "false"
    assert run.data.metrics["train/ep_bytes_per_token"] > 0
    recorded = metrics_of(folder.path)
    for metric in ("train/loss", "train/grad_norm", "train/update_norm", "train/lr", "moe/max_vio_batch"):
        points = {point.step: point.value for point in client.get_metric_history(folder.info.id, metric)}
        assert points == {step: metrics[metric] for step, metrics in recorded.items()}
    assert run.data.metrics["final/val_loss"] == pytest.approx(run.data.metrics["val/loss"], abs=1e-4)
    assert run.inputs is not None
    assert len(run.inputs.dataset_inputs[0].dataset.digest) == 36
    artifacts = {artifact.path for artifact in client.list_artifacts(folder.info.id)}
    assert {"config.yaml", "environment.json", "figures"} <= artifacts
    # What the terminal shows: progress, the table, the way to the UI, and no framework's noise.
    assert re.search(r"step 12/12 .*val \d", pair.stdout)
    assert f"/runs/{folder.info.id}" in pair.stdout
    noise = [line for line in (pair.stdout + pair.stderr).splitlines() if "ray::" in line or "pid=" in line]
    assert noise == []


def test_more_workers_than_cpus_are_refused_with_the_arithmetic(tmp_path: Path) -> None:
    done = run_steadymoe(
        tmp_path,
        "train", "micro", *sets("parallel.workers=512", "data.global_batch_size=512", "validation.max_tokens=65536"),
        code=2,
    )  # fmt: skip
    assert re.fullmatch(r"error: parallel\.workers \(512\) .* 512 CPUs, but this machine has \d+\n", done.stderr)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.usefixtures("pair")
def test_one_seed_gives_equal_losses_twice_and_expert_parallelism_the_same_to_1e5(
    home: Path, alone: dict[int, dict[str, float]]
) -> None:
    run_steadymoe(home, "train", "micro", *sets(*PAIR, "tracking.run_name=again"))
    first, again = (metrics_of(folders()[name].path) for name in ("pair", "again"))
    assert first == again
    _assert_equal_while_routed_alike(alone, first)


def _assert_equal_while_routed_alike(other: dict[int, dict[str, float]], one: dict[int, dict[str, float]]) -> None:
    """Losses and norms agree to 1e-5 until a tie between two experts falls the other way, which rounding may decide.

    From there on a token has been to another expert: the two are different runs that stay near each other.
    """
    unlike = [s for s, m in one.items() if other[s]["moe/max_vio_batch"] != pytest.approx(m["moe/max_vio_batch"])]
    first_unlike = min(unlike, default=len(one) + 1)
    assert first_unlike > 10
    for step, metrics in one.items():
        for metric in ("train/loss", "train/grad_norm"):
            tolerance = 1e-5 if step < first_unlike else 1e-2
            assert other[step][metric] == pytest.approx(metrics[metric], rel=tolerance), (step, metric)


@pytest.mark.slow
def test_a_resumed_command_continues_the_same_run_and_equals_an_undisturbed_one(
    home: Path, alone: dict[int, dict[str, float]]
) -> None:
    run_steadymoe(home, "train", "micro", *sets(CONSTANT, "schedule.steps=7", "tracking.run_name=parts"))
    run_steadymoe(home, "train", "--resume", "parts", "--set", "schedule.steps=12")
    parts = folders()["parts"]
    whole, resumed = ({s: m["train/loss"] for s, m in ms.items()} for ms in (alone, metrics_of(parts.path)))
    assert resumed == whole
    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    assert client.get_run(parts.info.id).info.status == "FINISHED"
    assert len(client.get_metric_history(parts.info.id, "train/loss")) == 12
    refused = run_steadymoe(home, "train", "--resume", "parts", "--set", "optimizer.lr=1", code=2)
    assert "optimizer.lr" in refused.stderr
