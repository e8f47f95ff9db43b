from pathlib import Path

import pytest

from pipelines.errors import UserError
from pipelines.home import HOME_VARIABLE, runs_dir
from pipelines.run_folder import RunFolder, RunInfo, find_run, free_name


def add_run(run_id: str, name: str, minute: int = 0, parent: str | None = None) -> RunFolder:
    folder = RunFolder(runs_dir() / run_id)
    created = f"2026-05-01T10:{minute:02}:00+00:00"
    folder.write_info(RunInfo(run_id, name, "steadymoe", "1", created, "sqlite:////tmp/mlflow.db", parent))
    return folder


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))


def test_a_run_is_found_by_id_beginning_name_and_as_the_latest() -> None:
    old, new = add_run("abc111", "tiny-1", minute=1), add_run("abd222", "tiny-2", minute=2)
    assert find_run("abc111") == old
    assert find_run("abc") == old
    assert find_run("tiny-2") == new
    assert find_run("latest") == new
    assert find_run("latest").info.name == "tiny-2"


def test_the_latest_run_is_no_trial_of_a_study() -> None:
    run = add_run("abc111", "tiny-1", minute=1)
    trial = add_run("abd222", "sign-s0", minute=2, parent="study")
    assert find_run("latest") == run
    assert find_run("sign-s0") == trial


def test_where_there_are_trials_alone_the_latest_is_one() -> None:
    add_run("abc111", "none-s0", minute=1, parent="study")
    trial = add_run("abd222", "sign-s0", minute=2, parent="study")
    assert find_run("latest") == trial


def test_a_name_wins_over_the_beginning_of_an_id() -> None:
    add_run("abc111", "tiny-1")
    named = add_run("def222", "abc")
    assert find_run("abc") == named


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("ab", r"run ab: several runs are meant; name one by its id: abc111 \(tiny-1\), abd222 \(small-1\)"),
        ("tiny1", "run tiny1: no run has this id or name; did you mean tiny-1?"),
        ("latets", "did you mean latest"),
        ("zzz", "the newest runs are small-1, tiny-1"),
        ("", "no run has this id or name"),
    ],
)
def test_a_run_that_is_not_clear_is_refused_with_what_there_is(run: str, message: str) -> None:
    add_run("abc111", "tiny-1", minute=1)
    add_run("abd222", "small-1", minute=2)
    with pytest.raises(UserError, match=message):
        find_run(run)


def test_without_runs_the_message_says_where_they_would_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"there are no runs in {tmp_path}/runs yet"):
        find_run("latest")


def test_names_are_counted_on() -> None:
    assert free_name(None, "tiny") == "tiny-1"
    add_run("a1", "tiny-1")
    assert free_name(None, "tiny") == "tiny-2"
    assert free_name("mine", "tiny") == "mine"
    add_run("a2", "mine")
    assert free_name("mine", "tiny") == "mine-2"
