"""The training command as a user meets it: real Ray Train workers, a real MLflow database, a real exit code."""

import re
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.pipelines.driver import folders, run_steadymoe, sets
from tests.pipelines.small_run import metrics_of


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEADYMOE_HOME", str(tmp_path))


def test_a_run_on_two_expert_parallel_workers_ends_finished_in_mlflow_with_all_its_figures(tmp_path: Path) -> None:
    done = run_steadymoe(
        tmp_path, "train", "micro", *sets("parallel.workers=2", "parallel.expert_parallel=2", "tracking.run_name=pair")
    )
    folder = folders()["pair"]
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
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
    assert re.search(r"step 12/12 .*val \d", done.stdout)
    assert f"/runs/{folder.info.id}" in done.stdout
    noise = [line for line in (done.stdout + done.stderr).splitlines() if "ray::" in line or "pid=" in line]
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
def test_one_seed_gives_equal_losses_twice_and_expert_parallelism_the_same_to_1e5(tmp_path: Path) -> None:
    for name, settings in {
        "first": ["parallel.workers=2", "parallel.expert_parallel=2"],
        "again": ["parallel.workers=2", "parallel.expert_parallel=2"],
        "replicas": ["parallel.workers=2"],
        "alone": [],
    }.items():
        run_steadymoe(tmp_path, "train", "micro", *sets(*settings, "schedule.steps=20", f"tracking.run_name={name}"))
    first, again, replicas, alone = (metrics_of(folders()[n].path) for n in ("first", "again", "replicas", "alone"))
    assert first == again
    for other in (replicas, alone):
        _assert_equal_while_routed_alike(other, first)


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
def test_a_resumed_command_continues_the_same_run_and_equals_an_undisturbed_one(tmp_path: Path) -> None:
    run_steadymoe(tmp_path, "train", "micro", *sets("schedule.decay.kind=constant", "tracking.run_name=whole"))
    run_steadymoe(
        tmp_path,
        "train", "micro", *sets("schedule.decay.kind=constant", "schedule.steps=7", "tracking.run_name=parts")
    )  # fmt: skip
    run_steadymoe(tmp_path, "train", "--resume", "parts", "--set", "schedule.steps=12")
    whole, parts = (folders()[name] for name in ("whole", "parts"))
    losses = [{s: m["train/loss"] for s, m in metrics_of(folder.path).items()} for folder in (whole, parts)]
    assert losses[0] == losses[1]
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert client.get_run(parts.info.id).info.status == "FINISHED"
    assert len(client.get_metric_history(parts.info.id, "train/loss")) == 12
    refused = run_steadymoe(tmp_path, "train", "--resume", "parts", "--set", "optimizer.lr=1", code=2)
    assert "optimizer.lr" in refused.stderr
