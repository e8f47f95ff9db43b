"""`steadymoe sweep` as far as it goes without Ray: lists, the whole config, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from infra.cli import main
from pipelines.home import HOME_VARIABLE
from pipelines.loading import preset_names
from pipelines.yaml_text import parse_document
from tests.tuning.sweep_file import RANDOM, write_sweep
from tuning.sweep_config import SweepConfig
from tuning.sweep_loading import SWEEPS, load_sweep


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def complaint(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["sweep", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("error: ").rstrip("\n")


def test_without_a_name_the_sweeps_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == preset_names(SWEEPS)
    assert all(line.endswith(load_sweep(line.split()[0]).config.title) for line in lines)


def test_what_is_printed_loads_back_to_an_equal_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--set", "optimizer.beta2=0.9", "--trials", "7", "--budget-minutes", "1.5", "--print-config"]
    assert main(["sweep", "stability", *words]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    plan = load_sweep(str(printed))
    assert plan == load_sweep("stability", ["optimizer.beta2=0.9"], budget={"trials": 7, "minutes": 1.5})
    assert (plan.config.budget.trials, plan.config.settings) == (7, ["optimizer.beta2=0.9"])
    assert set(parse_document(printed.read_text(), "printed").tree) == set(SweepConfig.model_fields)


@pytest.mark.parametrize(
    ("changes", "words", "line"),
    [
        ({}, ["stabilty"], "unknown sweep 'stabilty'; did you mean stability? Sweeps: "),
        ({}, ["other.yaml"], "other.yaml: cannot be read: No such file or directory"),
        ({}, ["mine.yaml", "--set", "lr=1"], "mine.yaml: at lr=0.001: lr: unknown key; did you mean optimizer.lr?"),
        ({}, ["mine.yaml", "--set", "optimizer.lr=1"], "mine.yaml: --set: optimizer.lr has no effect"),
        ({"serchers": 1}, ["mine.yaml"], "mine.yaml: serchers: unknown key; did you mean searcher? (set by mine.yaml"),
        ({"seeds": 2}, ["mine.yaml", "--trials", "1"], "mine.yaml: budget.trials: should be at least seeds (2)"),
        (RANDOM | {"budget": None}, ["mine.yaml"], "mine.yaml: budget: should have trials, tokens or minutes"),
        ({}, ["--resume", "latest"], "sweep latest: there are no sweeps in "),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    changes: dict[str, Any], words: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sweep(tmp_path, changes)
    assert complaint(capsys, *words).startswith(line)
    assert not list((tmp_path / "home").glob("sweeps/*"))
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == ["mine.yaml"]
