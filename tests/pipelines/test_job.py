"""What a driver knows of its job, and how a job's log tells the exit code."""

import json
from collections.abc import Callable
from typing import NoReturn

import pytest

from pipelines.job import JOB_TAG, exit_code_in, job_tags, run_in_job, submission_id


@pytest.fixture
def in_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ray sets it for the driver of a job."""
    config = {"runtime_env": {}, "metadata": {"job_submission_id": "raysubmit_1", "job_name": "raysubmit_1"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(config))


def raising(error: BaseException) -> Callable[[], NoReturn]:
    def main() -> NoReturn:
        raise error

    return main


def test_outside_of_a_job_there_is_no_tag_and_no_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert submission_id() is None
    assert job_tags() == {}
    assert run_in_job(lambda: 3) == 3
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("in_a_job")
def test_in_a_job_the_log_tells_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert job_tags() == {JOB_TAG: "raysubmit_1"}
    assert run_in_job(lambda: 3) == 3
    log = "before\n" + capsys.readouterr().out
    assert exit_code_in(log) == 3
    # Ray's own processes may write after the driver, and a job may watch another.
    assert exit_code_in("steadymoe: exit code 1\n" + log + "after\nexit code 7\n") == 3


@pytest.mark.usefixtures("in_a_job")
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SystemExit(130), 130),
        (SystemExit(None), 0),
        (SystemExit("words"), 1),
        (KeyboardInterrupt(), 130),
        (ValueError(), 1),
    ],
)
def test_every_way_out_writes_it(error: BaseException, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(type(error)):
        run_in_job(raising(error))
    assert exit_code_in(capsys.readouterr().out) == code


@pytest.mark.parametrize(
    "log", ["", "exit code 1\n", "the steadymoe: exit code 1\n", "steadymoe: exit code\n", "steadymoe: exit code 1, or"]
)
def test_a_log_without_the_line_has_none(log: str) -> None:
    assert exit_code_in(log) is None
