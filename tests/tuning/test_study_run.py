"""What a study remembers in its folder."""

from pathlib import Path

import pytest

from pipelines.errors import UserError
from pipelines.home import HOME_VARIABLE, studies_dir
from pipelines.run_folder import RunFolder, RunInfo
from tuning.results import TrialKey
from tuning.study_run import TrialRecord, add_trial, find_study, read_trials

FIRST = TrialRecord(TrialKey(0, "a"), "/runs/x", "finished", 1.5)
SECOND = TrialRecord(TrialKey(3, "as-b", 1e-05), "/runs/ü", "diverged", 2.0, {"schedule": {"steps": 9}})


def write_study(name: str, minute: int) -> RunFolder:
    folder = RunFolder(studies_dir() / f"{minute:032x}")
    created = f"2026-05-01T10:{minute:02}:00+00:00"
    folder.write_info(RunInfo(folder.path.name, name, "studies", "1", created, "sqlite:////tmp/mlflow.db"))
    return folder


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))


def test_trials_are_remembered_in_their_order(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert read_trials(folder) == []
    add_trial(folder, SECOND)
    add_trial(folder, FIRST)
    assert read_trials(folder) == [SECOND, FIRST]


def test_a_line_that_was_cut_short_anywhere_costs_that_trial_alone(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "whole")
    folder.path.mkdir()
    add_trial(folder, FIRST)
    [ledger] = folder.path.iterdir()
    whole = ledger.read_bytes()
    for length in range(len(whole)):
        torn = RunFolder(tmp_path / f"torn-{length}")
        torn.path.mkdir()
        (torn.path / ledger.name).write_bytes(whole[:length])
        # The text of a line whose end alone is missing is whole.
        kept = [FIRST] if length == len(whole) - 1 else []
        assert read_trials(torn) == kept
        add_trial(torn, SECOND)
        assert read_trials(torn) == [*kept, SECOND], length


def test_a_study_is_found_by_name_id_and_as_the_latest() -> None:
    old, new = write_study("clip-1", 1), write_study("clip-2", 2)
    assert find_study("clip-1") == old
    assert find_study(new.info.id) == new
    assert find_study("latest") == new


def test_what_is_no_study_is_refused_in_a_study_s_words(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"study clip-1: there are no studies in {tmp_path}/studies yet"):
        find_study("clip-1")
    write_study("clip-1", 1)
    with pytest.raises(UserError, match=r"study clap-1: no study has this id or name; did you mean clip-1\?"):
        find_study("clap-1")
