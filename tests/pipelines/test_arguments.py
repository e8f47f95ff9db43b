"""The arguments of `train`, however they are ordered on the command line."""

from pathlib import Path

import pytest

from pipelines.arguments import ExportArguments, TrainArguments
from pipelines.command_line import EXIT_DEFECT, parse, run_command
from pipelines.errors import UserError


def train(*argv: str) -> TrainArguments:
    return parse(TrainArguments, argv, "train")


def complaint(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        train(*argv)
    return str(caught.value)


def test_no_argument_means_tiny() -> None:
    arguments = train()
    assert (arguments.presets, arguments.settings) == (["tiny"], [])
    assert arguments.resume is None
    assert not arguments.print_config


def test_options_may_stand_between_presets() -> None:
    arguments = train("micro", "--set", "seed=1", "a.yaml", "--print-config", "--set=seed=2", "b.yaml")
    assert arguments.presets == ["micro", "a.yaml", "b.yaml"]
    assert arguments.settings == ["seed=1", "seed=2"]
    assert arguments.print_config


@pytest.mark.parametrize("value", ["x=[1,2]", 'x="a, b"', "x={a: 1, b: 2}", "x=a\\", "[1,2]", "", "null", "x=ü"])
def test_values_arrive_as_they_were_typed(value: str) -> None:
    assert train(value, "--set", value).settings == [value]
    assert train(value, "--set", value).presets == [value]


def test_environment_variables_are_not_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ["presets", "PRESETS", "resume", "RESUME", "set", "init_from"]:
        monkeypatch.setenv(name, '["small"]')
    options = {"resume": None, "init_from": None, "print_config": False}
    assert train().model_dump() == {"presets": ["tiny"], "settings": [], **options}


def test_settings_and_presets_make_the_config() -> None:
    assert train("micro", "--set", "optimizer.lr=1e-4").config().optimizer.lr == 1e-4


@pytest.mark.parametrize("key", ["schedule.steps", "tracking.uri", "tracking.run_name"])
def test_a_resumed_run_may_change_its_length_and_its_tracking(key: str) -> None:
    assert train("--resume", "latest", "--set", f"{key}=9").resume == "latest"


@pytest.mark.parametrize(
    "key", ["optimizer.lr", "schedule", "schedule.warmup_steps", "schedule.steps.x", "trackin.uri"]
)
def test_a_resumed_run_may_change_nothing_else(key: str) -> None:
    found = complaint("--resume", "latest", "--set", "schedule.steps=9", "--set", f"{key}=9")
    assert found == f"{key}: cannot change when a run is resumed; only schedule.steps and tracking.* can"


def test_a_resumed_run_takes_no_preset_not_even_the_default() -> None:
    assert "no preset may be given; leave out tiny" in complaint("tiny", "--resume", "latest")
    assert "does not go with --resume" in complaint("--resume", "latest", "--print-config")


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--sett", "a=1"], "unrecognized arguments: --sett"),
        (["--set"], "argument --set: expected one argument"),
        (["--resume"], "argument --resume: expected one argument"),
        (["--settings", "a=1"], "unrecognized arguments: --settings"),
    ],
)
def test_an_unknown_or_incomplete_option_is_refused(argv: list[str], line: str) -> None:
    assert complaint(*argv).startswith(line)


def test_a_full_disk_is_one_line_and_another_error_of_the_system_is_a_defect(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def write(arguments: object) -> int:
        # The kernel's own full disk.
        return Path("/dev/full").write_text("text")

    assert run_command(TrainArguments, write, [], "train") == EXIT_DEFECT
    told = capsys.readouterr().err
    assert told.startswith("error: no space left on the disk in ")
    assert told.endswith("; free some, then go on with --resume NAME\n")
    assert told.count("\n") == 1
    assert run_command(ExportArguments, write, ["run-1", "--to", "folder"], "export") == EXIT_DEFECT
    assert capsys.readouterr().err.endswith("; free some, then give the command again\n")
    with pytest.raises(FileNotFoundError):
        run_command(TrainArguments, lambda _: len((tmp_path / "none").read_text()), [], "train")
