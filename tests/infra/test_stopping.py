"""What `steadymoe down` does with the work on a head whose dashboard is slow, wrong or silent."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra import stopping
from infra.cluster_state import Head, token_file
from infra.dashboard import Dashboard
from infra.stopping import stop_work
from pipelines.errors import UserError
from pipelines.home import HOME_VARIABLE
from tests.infra.fake_head import FakeDashboard, fake_head


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Head, FakeDashboard]]:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    with fake_head(tmp_path) as found:
        yield found


def _stop(head: Head) -> None:
    stop_work(head, Dashboard(head.address, token_file()))


def _stopped(dashboard: FakeDashboard) -> list[str]:
    return sorted({request.split("/")[3] for request in dashboard.requests if request.startswith("POST")})


# The requests are: drivers, jobs, stop a, stop b, jobs.
@pytest.mark.parametrize(
    ("failure", "fails_at"), [*(("error", number) for number in range(5)), ("cut", 2), ("silence", 1)]
)
def test_every_job_is_stopped_whichever_request_fails(
    started: tuple[Head, FakeDashboard], failure: str, fails_at: int, capsys: pytest.CaptureFixture[str]
) -> None:
    head, dashboard = started
    for name in ("a", "b"):
        dashboard.add_job(name)
    dashboard.add_job("over", "SUCCEEDED")
    dashboard.failures = [*[""] * fails_at, failure, failure]
    _stop(head)
    assert _stopped(dashboard) == ["a", "b"]
    assert all(entry["status"] in ("STOPPED", "SUCCEEDED") for entry in dashboard.entries)
    printed = capsys.readouterr()
    assert printed.out.count("has ended after") == 2
    assert printed.err == ""


def test_a_dashboard_that_never_answers_is_asked_until_the_time_is_over(
    started: tuple[Head, FakeDashboard], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    head, dashboard = started
    monkeypatch.setattr(stopping, "stop_wait_s", lambda head: 1 - stopping._STOP_MARGIN_S)
    dashboard.failures = ["error"] * 1000
    _stop(head)
    assert len(dashboard.requests) > 2
    assert capsys.readouterr().err.startswith("The Ray head does not answer; it is ended with whatever runs on it.")


def test_drivers_that_are_no_jobs_are_named_and_nothing_is_stopped(
    started: tuple[Head, FakeDashboard], monkeypatch: pytest.MonkeyPatch
) -> None:
    head, dashboard = started
    monkeypatch.setattr(stopping, "_DRIVER_ENDS_S", 0.5)
    dashboard.add_job("a")
    dashboard.add_driver(os.getpid())
    with pytest.raises(UserError, match=rf"end them first: {os.getpid()} \(python work\.py\)$"):
        _stop(head)
    assert _stopped(dashboard) == []


def test_a_driver_that_has_just_ended_is_waited_for(started: tuple[Head, FakeDashboard]) -> None:
    head, dashboard = started
    dashboard.add_driver(os.getpid())
    dashboard.add_job("a")
    answer = dashboard._answer

    def ends_after_two(method: str, path: str) -> object:
        if len(dashboard.requests) > 2:
            dashboard.entries[0]["status"] = "SUCCEEDED"
        return answer(method, path)

    dashboard._answer = ends_after_two  # type: ignore[method-assign]
    _stop(head)
    assert _stopped(dashboard) == ["a"]
