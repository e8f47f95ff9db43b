"""`steadymoe study` as far as it goes without Ray: lists, the whole config, and what is refused."""

from pathlib import Path

import pytest

from infra.cli import main
from pipelines.home import HOME_VARIABLE
from pipelines.loading import preset_names
from pipelines.yaml_text import parse_document
from tests.tuning.study_file import write_study
from tuning.study_config import StudyConfig
from tuning.study_loading import STUDIES, load_study


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def complaint(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["study", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("error: ").rstrip("\n")


def test_without_a_name_the_studies_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == preset_names(STUDIES)
    assert lines[0].endswith(load_study(preset_names(STUDIES)[0]).title)


def test_what_is_printed_loads_back_to_an_equal_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--set", "optimizer.beta2=0.9", "--blocks", "2", "--budget-minutes", "1.5", "--print-config"]
    assert main(["study", "clip", *words]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    study = load_study(str(printed))
    assert study == load_study("clip", ["optimizer.beta2=0.9"], blocks=2, budget_minutes=1.5)
    assert (study.blocks, study.budget_minutes, study.settings) == (2, 1.5, ["optimizer.beta2=0.9"])
    # All of it is there, defaults too.
    assert set(parse_document(printed.read_text(), "printed").tree) == set(StudyConfig.model_fields)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["balanc"], "unknown study 'balanc'; did you mean balance? Studies: balance, clip,"),
        (["mine.yaml", "--set", "lr=1"], "mine.yaml: trial a-s0: lr: unknown key; did you mean optimizer.lr?"),
        (["mine.yaml", "--set", "seed=1"], "mine.yaml: --set: seed has no effect"),
        (["mine.yaml", "--findings", "."], "--findings .: is a folder; name a Markdown file in it"),
        (["mine.yaml", "--findings", "mine.yaml/x.md"], "--findings mine.yaml/x.md: cannot be written, for "),
        (["--resume", "latest", "--findings", "."], "--findings .: is a folder"),
        (["--resume", "latest"], "study latest: there are no studies in "),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    words: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study(tmp_path, {})
    assert complaint(capsys, *words).startswith(line)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]
