"""The command `steadymoe`: exit codes, one line for a mistake, and help without waiting for torch."""

import json
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import pytest

from infra.cli import Steadymoe, main
from pipelines.loading import load_config, parse_setting, preset_names
from pipelines.run_folder import RunFolder, RunInfo
from pipelines.yaml_text import parse_document
from tests.pipelines.spiky import record, spike

HEAVY = ("torch", "ray", "mlflow")


LIGHT: dict[str, int] = {
    "--help": 0,
    "--version": 0,
    "train --help": 0,
    "train micro --print-config": 0,
    "train micro --set optimizer.lr=fast": 2,
    "train --sett": 2,
    "train mikro": 2,
    "up --help": 0,
    "up --dashboard-port 70000": 2,
    "submit -- train micro --set optimizer.lr=fast": 2,
    "study": 0,
    "study --help": 0,
    "study balance --print-config": 0,
    "study balance --set seed=1": 2,
    "compare --help": 0,
    "compare nosuch other": 2,
    "replay --help": 0,
    "replay nosuch 1": 2,
    "replay nosuch 1 --with prayer": 2,
    # Of a home with one run that has had one event.
    "runs": 0,
    "runs --limit 0": 2,
    "spikes latest": 0,
    "spikes latest --json": 0,
    "spikes latest 1 --json": 0,
    "spikes latest 2": 2,
}
"""Exit codes of commands that have no need of the heavy libraries."""

ONE_AFTER_THE_OTHER = f"""
import json, sys
from infra.cli import main
found = []
for command in json.loads(sys.argv[1]):
    before = set(sys.modules)
    try:
        code = main(command.split())
    except SystemExit as stop:
        code = stop.code
    found.append([code, [name for name in {HEAVY!r} if name in set(sys.modules) - before]])
print(json.dumps(found))
"""


def loaded_by(commands: Iterable[str]) -> dict[str, tuple[int, list[str]]]:
    """Exit code of each command, and which of the heavy libraries it was the first to import in their interpreter."""
    words = [sys.executable, "-c", ONE_AFTER_THE_OTHER, json.dumps(list(commands))]
    run = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    found = json.loads(run.stdout.splitlines()[-1])
    return {command: (code, names) for command, (code, names) in zip(commands, found, strict=True)}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, list[str]]]:
    home = tmp_path_factory.mktemp("home")
    folder = RunFolder(home / "runs" / "abc")
    folder.write_info(RunInfo("abc", "tiny-1", "steadymoe", "7", "2026-05-01T10:00:00+00:00", "http://127.0.0.1:1"))
    record(folder, spike(100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEADYMOE_HOME", str(home))
        return loaded_by(LIGHT)


@pytest.mark.parametrize("command", LIGHT)
def test_help_lists_and_mistakes_do_without_the_heavy_libraries(
    command: str, loaded: dict[str, tuple[int, list[str]]]
) -> None:
    assert loaded[command] == (LIGHT[command], [])


def test_the_check_for_heavy_libraries_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEADYMOE_HOME", str(tmp_path))
    command = f"export latest --to {tmp_path}/out"
    assert loaded_by(["--version", command]) == {"--version": (0, []), command: (2, ["torch"])}


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([], "error: no command given (see steadymoe --help)"),
        (
            ["trian"],
            "error: argument "
            "{prepare,train,study,sweep,runs,spikes,compare,replay,deliver,export,up,status,down,submit}: "
            "invalid choice: 'trian'",
        ),
        (["--nonsense"], "error: unrecognized arguments: --nonsense"),
        (["train", "--nonsense"], "error: unrecognized arguments: --nonsense"),
        (["train", "mikro"], "error: unknown preset 'mikro'"),
        (["train", "missing.yaml"], "error: missing.yaml: cannot be read"),
        (["train", "micro", "--set", "lr=1"], "error: lr: unknown key; did you mean optimizer.lr? (set by --set)"),
        (["train", "micro", "--resume", "latest"], "error: --resume takes the config of the run"),
        (["train", "--resume", "latest", "--set", "optimizer.lr=1"], "error: optimizer.lr: cannot change"),
        (["spikes"], "error: the following arguments are required: RUN"),
        (["spikes", "a", "1", "2"], "error: one event at a time; leave out 2"),
        (["spikes", "a", "--full"], "error: --full shows the text of one event's batch, so it needs an event"),
        (["spikes", "a", "1", "--full", "--json"], "error: --json prints what is recorded, and the text is not"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(
    argv: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(line)
    assert captured.err.count("\n") == 1


def test_several_mistakes_are_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "micro", "--set", "seed=-1", "--set", "lr=1"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("error: ") for line in lines)


def test_print_config_shows_the_whole_tree_and_stops(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "micro", "--set", "optimizer.lr=1e-4", "--print-config"]) == 0
    printed = parse_document(capsys.readouterr().out, "printed").tree
    assert printed == load_config(["micro"], ["optimizer.lr=1e-4"]).model_dump(mode="json")


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"steadymoe {version('steadymoe')}\n"


def test_help_has_an_example_that_works(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    examples = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  steadymoe train ")]
    assert examples
    for words in examples:
        presets = [word for word in words[2:] if word in preset_names()]
        settings = [word for previous, word in pairwise(words) if previous == "--set"]
        load_config(presets, settings)
        assert all(parse_setting(setting) for setting in settings)


@pytest.mark.parametrize("command", [name for name in Steadymoe.model_fields if name != "version"])
def test_the_help_of_every_command_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"\n  steadymoe {command}" in capsys.readouterr().out
