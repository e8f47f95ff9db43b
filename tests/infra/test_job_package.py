"""The command and the files of a job: right before they are sent, and the same wherever they were typed."""

import json
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from infra.job_package import PACKAGES, pack, read_command
from moe.config.hf import hf_config
from pipelines.arguments import TrainArguments
from pipelines.command_line import parse
from pipelines.errors import UserError
from pipelines.loading import load_config
from pipelines.yaml_text import dump, parse_document
from tests.infra.local_cluster import PROJECT
from tuning.arguments import StudyArguments
from tuning.study_loading import STUDIES, load_study, trial_configs
from tuning.sweep_loading import SWEEPS

LIMIT_BYTES = 5_000_000


def test_a_command_of_presets_and_settings_stays_as_it_was_typed() -> None:
    words = ["tiny", "--set", "optimizer.lr=1e-3", "--set=seed=2"]
    command = read_command(["train", *words])
    assert shlex.split(command.entrypoint) == ["python", "-m", "pipelines.train", *words]
    assert command.files == {}
    assert read_command(["train"]).entrypoint == "python -m pipelines.train"
    assert read_command(["train", "--resume", "a b"]).entrypoint == "python -m pipelines.train --resume 'a b'"


def test_files_go_along_and_paths_in_them_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one").mkdir()
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text("data: {corpus: {kind: files, paths: [text, /usr/include]}, tokenizer: t.json}\n")
    Path("one/my.yaml").write_text("tracking: {uri: 'sqlite:///my.db'}\n")
    typed = ["micro", "my.yaml", "--set", "seed=7", "one/my.yaml"]
    command = read_command(["train", *typed])
    copy = tmp_path / "copy"
    copy.mkdir()
    pack(command, copy)

    expected = parse(TrainArguments, typed, "train").config()
    monkeypatch.chdir(copy)
    config = parse(TrainArguments, shlex.split(command.entrypoint)[3:], "train").config()
    assert config.data.corpus.model_dump()["paths"] == [str(tmp_path / "text"), "/usr/include"]
    assert config.data.tokenizer == str(tmp_path / "t.json")
    assert config.tracking.uri == f"sqlite:///{tmp_path}/my.db"
    assert config.seed == 7
    assert config.model == expected.model
    # The run's name is made from the file's.
    assert {Path(word).name for word in command.words if word.endswith(".yaml")} == {"my.yaml"}


def test_prepared_text_and_given_weights_are_found_from_the_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("weights").mkdir()
    model = load_config(["micro"], ["model.vocab_size=257"]).model
    Path("weights/config.json").write_text(json.dumps(hf_config(model)))
    Path("weights/model.safetensors").touch()
    command = read_command(
        ["train", "micro", "--set", "data.corpus={kind: prepared, path: text}", "--init-from", "weights"]
    )
    assert shlex.split(command.entrypoint)[3:] == [
        "micro", "--set", "data.corpus={kind: prepared, path: text}", "--init-from", f"{tmp_path}/weights",
        "--set", f'data.corpus.path="{tmp_path}/text"',
    ]  # fmt: skip
    assert f"--init-from={tmp_path}/weights" in read_command(["train", "--init-from=weights"]).words


def test_a_path_is_written_as_it_is_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "ü 😀 'x'"
    folder.mkdir()
    monkeypatch.chdir(folder)
    command = read_command(["train", "micro", "--set", "data.corpus={kind: prepared, path: text}"])
    assert f'data.corpus.path="{folder}/text"' in command.words
    monkeypatch.chdir(tmp_path)
    config = parse(TrainArguments, shlex.split(command.entrypoint)[3:], "train").config()
    assert config.data.corpus.model_dump()["path"] == f"{folder}/text"


def test_the_settings_of_a_resumed_run_are_checked_and_hold_in_the_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    typed = ["--resume", "x", "--set", "schedule.steps=3", "--set", "tracking.uri=sqlite:///my.db"]
    command = read_command(["train", *typed])
    assert command.words == [*typed, "--set", f'tracking.uri="sqlite:///{tmp_path}/my.db"']
    assert command.resume == "x"


def test_a_study_goes_along_with_its_file_and_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = parse_document((STUDIES / "warmup.yaml").read_text(), "warmup").tree
    content["config"]["data"] = {"corpus": {"kind": "files", "paths": ["text"]}}
    Path("mine.yaml").write_text(dump(content))
    command = read_command(["study", "mine.yaml", "--blocks", "2", "--findings", "found.md"])
    copy = tmp_path / "copy"
    copy.mkdir()
    pack(command, copy)

    assert shlex.split(command.entrypoint)[:3] == ["python", "-m", "tuning.study"]
    monkeypatch.chdir(copy)
    arguments = parse(StudyArguments, command.words, "study")
    study = load_study(arguments.study[0], arguments.settings, **arguments.changed)
    assert {str(config.data.corpus.model_dump()["paths"]) for config in trial_configs(study)} == {
        f"['{tmp_path}/text']"
    }
    assert (Path(arguments.study[0]).name, study.blocks) == ("mine.yaml", 2)
    assert arguments.findings == f"{tmp_path}/found.md"


def test_a_sweep_goes_along_with_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = (SWEEPS / "lr-sensitivity.yaml").read_text(encoding="utf-8")
    Path("mine.yaml").write_text(sweep.replace("base: [micro]", "base: [micro]\nconcurrent: 1"), encoding="utf-8")
    command = read_command(["sweep", "mine.yaml", "--trials", "4"])
    assert command.files == {"configs/0/mine.yaml": Path("mine.yaml")}
    assert command.entrypoint == "python -m tuning.sweep configs/0/mine.yaml --trials 4"


def test_a_study_that_stands_on_a_file_is_refused_as_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = parse_document((STUDIES / "warmup.yaml").read_text(), "warmup").tree
    Path("mine.yaml").write_text(dump({**content, "base": ["micro", "more.yaml"]}))
    Path("more.yaml").write_text("optimizer: {beta2: 0.99}\n")
    with pytest.raises(UserError, match=r"^mine.yaml: base names more.yaml, which a job does not get"):
        read_command(["study", "mine.yaml"])


def test_a_replay_is_a_job_of_its_own_words() -> None:
    words = ["replay", "spiky", "loss-000051", "--with", "half-lr", "--set", "monitors.every_steps=0"]
    command = read_command(words)
    assert shlex.split(command.entrypoint) == ["python", "-m", "tuning.replay", *words[1:]]
    assert (command.resume, command.files) == ("spiky", {})


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "submit: no command given"),
        (["deliver", "latest"], "submit: 'deliver' cannot run as a job; what can: train, study, sweep, replay"),
        (["train", "micro", "--set", "optimizer.lr=fast"], "optimizer.lr: should be a valid number"),
        (["train", "missing.yaml"], "missing.yaml: cannot be read: No such file"),
        (["train", "--resume", "x", "--set", "schedule.steps=0"], "schedule.steps: should be greater than 0, got 0"),
        (["train", "--nonsense"], "unrecognized arguments: --nonsense (see steadymoe train --help)"),
        (["train", "micro", "--print-config"], "--print-config: needs no job"),
        (["sweep"], "submit: no sweep given"),
        (["sweep", "stabilty"], "unknown sweep 'stabilty'; did you mean stability?"),
        (
            ["sweep", "stability", "--set", "optimizer.lr=1"],
            "sweep stability: --set: optimizer.lr has no effect, for the space sets it",
        ),
        (["study"], "submit: no study given"),
        (["study", "balanse"], "unknown study 'balanse'; did you mean balance?"),
        (["study", "balance", "--print-config"], "--print-config: needs no job"),
        (["replay", "latest"], "the following arguments are required"),
        (["replay", "latest", "1", "--with", "halflr"], "--with halflr: no such treatment; did you mean half-lr?"),
        (["replay", "latest", "1", "--set", "lr"], "--set lr: should be key=value"),
    ],
)
def test_what_cannot_be_a_job_is_refused_in_one_line(words: list[str], line: str) -> None:
    with pytest.raises(UserError) as refused:
        read_command(words)
    assert str(refused.value).startswith(line)
    assert "\n" not in str(refused.value)


def test_the_copy_is_the_code_and_nothing_else(tmp_path: Path) -> None:
    pack(read_command(["train", "micro"]), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(PACKAGES)
    assert list(tmp_path.rglob("__pycache__")) == []
    assert (tmp_path / "pipelines" / "presets" / "micro.yaml").exists()
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < LIMIT_BYTES


@pytest.mark.skipif(shutil.which("git") is None or not (PROJECT / ".git").exists(), reason="needs git and a clone")
def test_what_rays_own_client_sends_of_the_project_is_small_and_without_state() -> None:
    def listed(*options: str) -> list[str]:
        return subprocess.run(
            ["git", "ls-files", "-z", *options], cwd=PROJECT, capture_output=True, text=True, check=True
        ).stdout.split("\0")[:-1]

    # Ray leaves out what .gitignore names.
    sent = listed("--cached", "--others", "--exclude-standard")
    sizes = {name: (PROJECT / name).stat().st_size for name in sent if (PROJECT / name).is_file()}
    assert sum(sizes.values()) < LIMIT_BYTES
    ignored = subprocess.run(
        ["git", "check-ignore", "cluster/token", "runs/x", "corpora/x", "mlflow.db", "mlartifacts/x"],
        cwd=PROJECT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert len(ignored.stdout.split()) == 5
