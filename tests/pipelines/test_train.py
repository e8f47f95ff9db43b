"""The training command as a user meets it: real Ray Train workers, a real MLflow database, a real exit code."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipelines.run_folder import RunFolder, run_folders
from tests.pipelines.small_run import SETTINGS, metrics_of

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def steadymoe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs ``steadymoe ARGUMENTS`` with a home of its own; a test that expects failure says so with ``code``."""
    monkeypatch.setenv("STEADYMOE_HOME", str(tmp_path))
    environment = {k: v for k, v in os.environ.items() if k not in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")}

    def run(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-c", "import sys; from infra.cli import main; sys.exit(main())", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done

    return run


def _sets(*settings: str) -> list[str]:
    keys = {setting.partition("=")[0] for setting in settings}
    chosen = [*(s for s in SETTINGS if s.partition("=")[0] not in keys), *settings]
    return [word for setting in chosen for word in ("--set", setting)]


def _folders() -> dict[str, RunFolder]:
    return {folder.info.name: folder for folder in run_folders()}


def test_a_run_on_two_expert_parallel_workers_ends_finished_in_mlflow_with_all_its_figures(
    steadymoe: Command, tmp_path: Path
) -> None:
    done = steadymoe(
        "train", "micro", *_sets("parallel.workers=2", "parallel.expert_parallel=2", "tracking.run_name=pair")
    )
    folder = _folders()["pair"]
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


def test_more_workers_than_cpus_are_refused_with_the_arithmetic(steadymoe: Command) -> None:
    done = steadymoe(
        "train", "micro", *_sets("parallel.workers=512", "data.global_batch_size=512", "validation.max_tokens=65536"),
        code=2,
    )  # fmt: skip
    assert re.fullmatch(r"error: parallel\.workers \(512\) .* 512 CPUs, but the Ray cluster has \d+\n", done.stderr)
    assert _folders() == {}


@pytest.mark.slow
def test_one_seed_gives_equal_losses_twice_and_expert_parallelism_the_same_to_1e5(steadymoe: Command) -> None:
    for name, settings in {
        "first": ["parallel.workers=2", "parallel.expert_parallel=2"],
        "again": ["parallel.workers=2", "parallel.expert_parallel=2"],
        "replicas": ["parallel.workers=2"],
        "alone": [],
    }.items():
        steadymoe("train", "micro", *_sets(*settings, "schedule.steps=20", f"tracking.run_name={name}"))
    first, again, replicas, alone = (metrics_of(_folders()[n].path) for n in ("first", "again", "replicas", "alone"))
    assert first == again
    for other in (replicas, alone):
        for step, metrics in first.items():
            for metric in ("train/loss", "train/grad_norm"):
                assert other[step][metric] == pytest.approx(metrics[metric], rel=1e-5), (step, metric)


@pytest.mark.slow
def test_a_resumed_command_continues_the_same_run_and_equals_an_undisturbed_one(
    steadymoe: Command, tmp_path: Path
) -> None:
    steadymoe("train", "micro", *_sets("schedule.decay.kind=constant", "tracking.run_name=whole"))
    steadymoe(
        "train", "micro", *_sets("schedule.decay.kind=constant", "schedule.steps=7", "tracking.run_name=parts")
    )  # fmt: skip
    steadymoe("train", "--resume", "parts", "--set", "schedule.steps=12")
    whole, parts = (_folders()[name] for name in ("whole", "parts"))
    losses = [{s: m["train/loss"] for s, m in metrics_of(folder.path).items()} for folder in (whole, parts)]
    assert losses[0] == losses[1]
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert client.get_run(parts.info.id).info.status == "FINISHED"
    assert len(client.get_metric_history(parts.info.id, "train/loss")) == 12
    refused = steadymoe("train", "--resume", "parts", "--set", "optimizer.lr=1", code=2)
    assert "optimizer.lr" in refused.stderr
