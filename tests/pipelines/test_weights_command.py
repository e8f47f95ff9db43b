"""train, export and train --init-from as a user meets them: real Ray Train workers, MLflow and exit codes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipelines.run_folder import RunFolder, run_folders
from tests.pipelines.small_run import SETTINGS, metrics_of

SETS = [word for setting in SETTINGS for word in ("--set", setting)]
PAIR = ["--set", "parallel.workers=2", "--set", "parallel.expert_parallel=2"]


def steadymoe(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")}
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


def run_named(name: str) -> RunFolder:
    return next(folder for folder in run_folders() if folder.info.name == name)


@pytest.mark.slow
def test_weights_go_out_of_one_run_and_into_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEADYMOE_HOME", str(tmp_path / "home"))
    folder = tmp_path / "weights"
    steadymoe("train", "micro", *SETS, *PAIR, "--set", "tracking.run_name=source")
    exported = steadymoe("export", "source", "--to", str(folder))
    assert exported.stdout.startswith(f"Wrote run source after 12 steps to {folder}:\n")
    again = steadymoe("export", "source", "--to", str(folder), code=2)
    assert again.stderr == f"error: --to {folder}: exists and is not empty; name a new folder\n"

    start = ["train", "tiny", "--init-from", str(folder), *SETS, *PAIR, "--set", "data.sequence_length=64"]
    done = steadymoe(*start, "--set", "schedule.steps=4", "--set", "tracking.run_name=second")
    assert f"weights: {folder}; the optimizer starts anew" in done.stdout
    second, source = run_named("second"), run_named("source")
    run = MlflowClient(f"sqlite:///{tmp_path / 'home' / 'mlflow.db'}").get_run(second.info.id)
    assert run.data.tags["init_from"] == str(folder)
    assert run.data.params["model.hidden_size"] == "48"
    assert metrics_of(second.path)[1]["train/loss"] < metrics_of(source.path)[1]["train/loss"] - 0.5

    # Resumed before anything was saved, it starts from the weights again.
    first = metrics_of(second.path)
    shutil.rmtree(second.checkpoints)
    second.spool.unlink()
    steadymoe("train", "--resume", "second")
    assert metrics_of(second.path) == first


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train", "micro", "--init-from", "{}/none"], "error: {}/none: no such folder of weights"),
        (["train", "--init-from", "{}", "--resume", "latest"], "error: --init-from starts a new run"),
        (["export", "latest", "--to", "{}/out"], "error: run latest: there are no runs in "),
        (["export", "latest"], "error: --to is required"),
        (["export", "latest", "--to", "{}/out", "--dtype", "fp8"], "error: --dtype fp8: should be 'fp32' or 'bf16'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEADYMOE_HOME", str(tmp_path / "home"))
    done = steadymoe(*(argument.format(tmp_path) for argument in arguments), code=2)
    assert done.stdout == ""
    assert done.stderr.startswith(line.format(tmp_path))
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
