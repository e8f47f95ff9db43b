"""What a user keeps secret stays out of everything that a run writes."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.cli import main
from pipelines import tracking
from pipelines.tracking import Tracker
from pipelines.tracking_store import open_store
from tests.pipelines.driver import run_steadymoe, sets
from tests.pipelines.mlflow_server import Server
from tests.pipelines.tracked import DATASET, config, train

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
    return [str(path) for path in files if PLANTED.encode() in _content(path)]


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes() if path.is_file() else b""
    except FileNotFoundError:  # Ray's last processes may still be clearing up
        return b""


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


@pytest.mark.parametrize("user", [f"me:{PLANTED}", f"me:a@{PLANTED}", PLANTED])
def test_a_password_in_the_config_is_refused_without_repeating_it(
    tmp_path: Path, user: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STEADYMOE_HOME", str(tmp_path))
    assert main(["train", "micro", "--set", f"tracking.uri=https://{user}@host/mlflow"]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: tracking.uri: holds a password, and the config is recorded")
    assert PLANTED not in printed.out + printed.err
    assert list(tmp_path.iterdir()) == []


def test_what_is_said_of_a_server_that_died_holds_no_password(
    home: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "FINISH_TIMEOUT_S", 1.0)
    uri = server.uri.replace("//", f"//me:a@{PLANTED}@")
    with Tracker.start(config(), open_store(uri), dataset=DATASET) as tracker:
        server.kill()
        train(tracker.folder, 1, 3)
    assert "could not be delivered" in (tracker.undelivered or "")
    assert server.uri in (tracker.undelivered or "")
    assert PLANTED not in (tracker.undelivered or "")
    assert _leaks(home) == []
