"""What a user keeps secret stays out of everything that a run writes."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipelines.driver import run_steadymoe, sets
from tests.pipelines.mlflow_server import Server

PLANTED = "pl4nted-s3cret"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "served").mkdir()
    server = Server(tmp_path / "served" / "server.db", tmp_path / "served" / "server.log")
    server.start()
    yield server
    server.kill()


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    # Short, because Ray makes Unix sockets in it.
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def _leaks(folder: Path) -> list[str]:
    """Files that hold the secret, and how much was looked at."""
    files = [Path(root) / name for root, _, names in os.walk(folder) for name in names]
    return [str(path) for path in files if path.is_file() and PLANTED.encode() in path.read_bytes()]


@pytest.mark.slow
def test_no_secret_of_the_environment_reaches_log_params_tags_artifacts_or_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server, ray_folder: Path
) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("STEADYMOE_HOME", str(home))
    done = run_steadymoe(
        home, "train", "micro", *sets("schedule.steps=4"),
        MLFLOW_TRACKING_URI=server.uri.replace("//", f"//me:{PLANTED}@"),
        AWS_SECRET_ACCESS_KEY=PLANTED, HF_TOKEN=PLANTED, WANDB_API_KEY=PLANTED, RAY_TMPDIR=str(ray_folder),
    )  # fmt: skip
    assert PLANTED not in done.stdout + done.stderr
    for folder in (home, tmp_path / "served", ray_folder):
        assert any(folder.iterdir()), f"nothing was written to {folder}"
        assert _leaks(folder) == []
    # What was left out of the run's files is taken from the environment again.
    run_steadymoe(
        home, "train", "--resume", "latest", "--set", "schedule.steps=6",
        MLFLOW_TRACKING_URI=server.uri.replace("//", f"//me:{PLANTED}@"), RAY_TMPDIR=str(ray_folder),
    )  # fmt: skip
    assert _leaks(home) == []


def test_a_password_in_the_config_is_refused_without_repeating_it(tmp_path: Path) -> None:
    refused = run_steadymoe(
        tmp_path, "train", "micro", "--set", f"tracking.uri=https://me:{PLANTED}@host/mlflow", code=2
    )
    assert refused.stderr.startswith("error: tracking.uri: holds a password, and the config is recorded")
    assert PLANTED not in refused.stdout + refused.stderr
    assert list(tmp_path.iterdir()) == []
