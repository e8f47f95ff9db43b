"""train, export and train --init-from as a user meets them: real Ray Train workers, MLflow and exit codes."""

import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from infra.cli import main
from tests.pipelines.driver import folders, run_steadymoe, sets
from tests.pipelines.small_run import metrics_of

PAIR = ("parallel.workers=2", "parallel.expert_parallel=2")


@pytest.mark.slow
def test_weights_go_out_of_one_run_and_into_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, folder = tmp_path / "home", tmp_path / "weights"
    monkeypatch.setenv("STEADYMOE_HOME", str(home))
    run_steadymoe(home, "train", "micro", *sets(*PAIR, "tracking.run_name=source"))
    exported = run_steadymoe(home, "export", "source", "--to", str(folder))
    assert exported.stdout.startswith(f"Wrote run source after 12 steps to {folder}:\n")
    again = run_steadymoe(home, "export", "source", "--to", str(folder), code=2)
    assert again.stderr == f"error: --to {folder}: exists and is not empty; name a new folder\n"

    settings = sets(*PAIR, "data.sequence_length=64", "schedule.steps=4", "tracking.run_name=second")
    done = run_steadymoe(home, "train", "tiny", "--init-from", str(folder), *settings)
    assert f"weights: {folder}; the optimizer starts anew" in done.stdout
    second, source = folders()["second"], folders()["source"]
    run = MlflowClient(f"sqlite:///{home / 'mlflow.db'}").get_run(second.info.id)
    assert run.data.tags["init_from"] == str(folder)
    assert run.data.params["model.hidden_size"] == "48"
    assert metrics_of(second.path)[1]["train/loss"] < metrics_of(source.path)[1]["train/loss"] - 0.5

    # Resumed before anything was saved, it starts from the weights again.
    first = metrics_of(second.path)
    shutil.rmtree(second.checkpoints)
    second.spool.unlink()
    run_steadymoe(home, "train", "--resume", "second")
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
    arguments: list[str],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("STEADYMOE_HOME", str(tmp_path / "home"))
    assert main([argument.format(tmp_path) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(line.format(tmp_path))
    assert printed.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
