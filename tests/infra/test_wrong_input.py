"""What a user gets wrong about the cluster and its jobs: one line, exit code 2, and nothing started or written."""

import os
import re
import socket
from pathlib import Path

import pytest

from infra.cli import main
from pipelines.home import HOME_VARIABLE
from tests.infra.local_cluster import FOREIGN


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    for name in FOREIGN:
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def complaint(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize("option", ["--dashboard-port", "--mlflow-port"])
def test_a_port_that_is_taken(option: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        other = {"--dashboard-port", "--mlflow-port"} - {option}
        line = complaint(capsys, "up", option, str(port), other.pop(), "0")
    assert line.startswith(f"{option}: port {port} is taken by process {os.getpid()} (")
    assert not (home / "cluster" / "state.json").exists()


@pytest.mark.usefixtures("home")
def test_no_head(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["submit", "--", "train", "micro"], ["submit", "--watch", "raysubmit_x"]):
        assert complaint(capsys, *words) == f"no Ray head runs for {home}; start one with: steadymoe up"


@pytest.mark.usefixtures("home")
def test_an_address_where_nothing_answers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    wanted = rf"(http://)?{address}: no Ray head answers there \(Connection refused\); start one with: steadymoe up"
    job = ["--", "train", "micro"]
    assert re.fullmatch(wanted, complaint(capsys, "submit", "--address", f"http://{address}", *job))
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert re.fullmatch(wanted, complaint(capsys, "submit", *job))
    assert "should be the address of a Ray dashboard" in complaint(capsys, "submit", "--address", "nonsense", *job)


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["submit"], "submit: no command given; for example: steadymoe submit -- train tiny"),
        (["submit", "--"], "submit: no command given; for example: steadymoe submit -- train tiny"),
        (["submit", "train", "tiny"], "unrecognized arguments: train tiny"),
        (["submit", "--", "deliver", "latest"], "submit: 'deliver' cannot run as a job; what can: train"),
        (["submit", "--", "train", "micro", "--set", "lr=1"], "lr: unknown key; did you mean optimizer.lr?"),
        (
            ["submit", "--", "train", "--resume", "x", "--set", "schedule.steps=many"],
            "schedule.steps: should be a valid",
        ),
        (["submit", "--", "train", "--resume", "x", "--set", "tracking.url=x"], "tracking.url: unknown key"),
        (["submit", "--", "train", "mine.yaml"], "mine.yaml: cannot be read: No such file"),
        (["submit", "--watch", "raysubmit_x", "--", "train"], "--watch shows a job that was submitted before"),
        (["submit", "--watch", "raysubmit_x", "--detach"], "--watch and --detach exclude each other"),
        (["up", "--mlflow-port", "70000"], "--mlflow-port 70000: should be less than or equal to 65535"),
        (["status", "tiny"], "unrecognized arguments: tiny"),
    ],
)
def test_what_was_typed_is_answered_before_any_head_is_looked_for(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert line in complaint(capsys, *words)


@pytest.mark.parametrize("place", ["/proc/steadymoe", "{}/file"])
def test_a_home_that_cannot_be(
    place: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "file").touch()
    wrong = place.format(home)
    monkeypatch.setenv(HOME_VARIABLE, wrong)
    assert re.fullmatch(rf"STEADYMOE_HOME: {wrong} cannot be made: .*; name another folder", complaint(capsys, "up"))
    for command in ("status", "down"):
        assert main([command]) == 0
        assert capsys.readouterr().out.startswith(f"Nothing runs for {wrong}.")
    assert list(home.iterdir()) == [home / "file"]


def test_down_makes_no_folders_to_say_that_nothing_runs(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(home / "new"))
    assert main(["down"]) == 0
    assert capsys.readouterr().out == f"Nothing runs for {home}/new.\n"
    assert list(home.iterdir()) == []


def test_without_a_cluster_status_and_down_say_so(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("status", "down"):
        assert main([command]) == 0
        assert capsys.readouterr().out.startswith(f"Nothing runs for {home}.")
    assert not (home / "cluster" / "state.json").exists()
