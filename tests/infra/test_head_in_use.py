"""`up` and `submit` with a head that runs already: waited for, reached without a proxy, and given time for its jobs."""

import os
import shlex
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray.job_submission

from infra.cli import main
from infra.cluster_state import ClusterState, Head, client_environment, write_state
from infra.processes import Service
from pipelines.home import HOME_VARIABLE
from tests.infra.fake_head import FakeDashboard, fake_head
from tests.infra.local_cluster import FOREIGN


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Head, FakeDashboard]]:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    for name in (*FOREIGN, "MLFLOW_TRACKING_URI", "no_proxy", "NO_PROXY"):
        # Set first, so that what the command sets is undone.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    with fake_head(tmp_path) as found:
        yield found


def test_up_waits_for_a_head_that_an_earlier_one_left_before_it_was_ready(
    started: tuple[Head, FakeDashboard], capsys: pytest.CaptureFixture[str]
) -> None:
    head, dashboard = started
    # Its dashboard answers as a server, too.
    write_state(ClusterState(head, Service(head.pid, head.started, head.mark, head.port, head.log)))
    dashboard.failures = ["error"] * 1000
    threading.Timer(1.0, dashboard.failures.clear).start()
    assert main(["up"]) == 0
    assert dashboard.failures == []
    printed = capsys.readouterr().out
    assert "Ray head runs already" in printed
    assert "Ray head ready after" in printed
    assert main(["up"]) == 0
    assert "ready after" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("named", "then"),
    [
        ("", "127.0.0.1,localhost"),
        ("example.org, localhost", "example.org,localhost,127.0.0.1"),
        ("a,127.0.0.1,localhost", "a,127.0.0.1,localhost"),
        ("*", "*"),
    ],
)
def test_no_proxy_stands_between_a_client_and_this_machine(
    started: tuple[Head, FakeDashboard], named: str, then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", named)
    found = client_environment(ClusterState(started[0]))
    assert (found["no_proxy"], found["NO_PROXY"]) == (then, then)


class FakeClient:
    """Takes jobs in the place of Ray's client."""

    def __init__(self, address: str) -> None:
        self.address = address

    submitted: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012

    def submit_job(self, entrypoint: str, runtime_env: dict[str, Any]) -> str:
        assert Path(runtime_env.pop("working_dir"), "pipelines").is_dir()
        self.submitted.append((entrypoint, runtime_env))
        return "raysubmit_x"


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    monkeypatch.setattr(ray.job_submission, "JobSubmissionClient", FakeClient)
    monkeypatch.setattr(FakeClient, "submitted", [])
    return FakeClient.submitted


JOB = ["--", "train", "micro"]


def test_a_job_on_a_head_of_someone_elses_gets_time_to_save(
    started: tuple[Head, FakeDashboard],
    submitted: list[tuple[str, dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    submit = ["submit", "--detach", "--address", started[0].address, *JOB]
    assert main(submit) == 0
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "300")
    assert main(submit) == 0
    assert [environment for _, environment in submitted] == [
        {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120"}},
        {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "300"}},
    ]


def test_a_job_on_the_own_head_has_the_heads_time_and_reaches_it_without_a_proxy(
    started: tuple[Head, FakeDashboard], submitted: list[tuple[str, dict[str, Any]]]
) -> None:
    write_state(ClusterState(started[0]))
    assert main(["submit", "--detach", *JOB]) == 0
    ((entrypoint, environment),) = submitted
    assert shlex.split(entrypoint) == ["python", "-m", "pipelines.train", "micro"]
    assert environment == {}
    assert os.environ["no_proxy"] == "127.0.0.1,localhost"
