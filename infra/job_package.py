"""What a job gets: a copy of the project's packages and of the user's YAML files, and the command that runs there."""

import json
import os
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pipelines
from pipelines.arguments import TrainArguments
from pipelines.command_line import parse
from pipelines.config import RunConfig
from pipelines.errors import UserError
from pipelines.loading import FILE_SUFFIX, load_config, settings_tree
from pipelines.paths import absolute
from pipelines.prepare import absolute_paths
from pipelines.tracking_store import SQLITE
from tuning.arguments import ReplayArguments, StudyArguments, SweepArguments
from tuning.study_loading import load_study, trial_configs
from tuning.sweep_loading import load_sweep, trial_config
from tuning.treatments import refuse_unknown

PACKAGES = ("moe", "pipelines", "tuning", "infra")
_FILES = "configs"
_PATHS = (("data", "corpus", "paths"), ("data", "corpus", "path"), ("data", "tokenizer"), ("tracking", "uri"))
"""Keys that hold paths."""


@dataclass(frozen=True)
class JobCommand:
    """A command that is right, as far as that can be told before it runs."""

    module: str
    words: list[str]
    """Its arguments, as they hold in the copy."""
    files: dict[str, Path]
    """The user's files by their path in the copy."""
    resume: str | None
    """The run that it continues, or replays a spike of."""

    @property
    def entrypoint(self) -> str:
        """The command line of the job's driver."""
        return shlex.join(["python", "-m", self.module, *self.words])


def read_command(words: Sequence[str]) -> JobCommand:
    """Check a command for a job, and make it independent of the folder where it was typed.

    Raises:
        UserError: it cannot be a job, or its arguments or its config are wrong; one line a problem.
    """
    if not words:
        raise UserError("submit: no command given; for example: steadymoe submit -- train tiny")
    name, *rest = words
    if name not in _READERS:
        raise UserError(f"submit: {name!r} cannot run as a job; what can: {', '.join(_READERS)}")
    return _READERS[name](rest)


def _train_command(words: Sequence[str]) -> JobCommand:
    arguments = parse(TrainArguments, words, "steadymoe train")
    _refuse_print_config(arguments.print_config, "train")
    command = _job("pipelines.train", words, arguments.presets, _checked(arguments), arguments.resume)
    return replace(command, words=_absolute_option(command.words, "--init-from"))


def _study_command(words: Sequence[str]) -> JobCommand:
    arguments = parse(StudyArguments, words, "steadymoe study")
    _refuse_print_config(arguments.print_config, "study")
    if arguments.resume is None and not arguments.study:
        raise UserError("submit: no study given; for example: steadymoe submit -- study balance")
    # A study that goes on has its config already, and was made with absolute paths.
    studies, config = [], None
    if arguments.resume is None:
        studies = arguments.study
        study = load_study(studies[0], arguments.settings, **arguments.changed)
        _refuse_files(studies[0], [*study.base, *(name for arm in study.arms.values() for name in arm.base)])
        config = trial_configs(study)[0]
    command = _job("tuning.study", words, studies, config, None)
    return replace(command, words=_absolute_option(command.words, "--findings"))


def _sweep_command(words: Sequence[str]) -> JobCommand:
    arguments = parse(SweepArguments, words, "steadymoe sweep")
    _refuse_print_config(arguments.print_config, "sweep")
    if arguments.resume is None and not arguments.sweep:
        raise UserError("submit: no sweep given; for example: steadymoe submit -- sweep stability")
    config = None
    if arguments.resume is None:
        plan = load_sweep(arguments.sweep[0], arguments.settings, **arguments.changed)
        _refuse_files(arguments.sweep[0], plan.config.base)
        config = trial_config(plan, plan.probe, plan.first_seed)
    return _job("tuning.sweep", words, arguments.sweep, config, None)


def _refuse_files(name: str, bases: Sequence[str]) -> None:
    if files := [base for base in bases if base.endswith(FILE_SUFFIX)]:
        raise UserError(f"{name}: base names {files[0]}, which a job does not get; put its keys under config")


def _replay_command(words: Sequence[str]) -> JobCommand:
    arguments = parse(ReplayArguments, words, "steadymoe replay")
    refuse_unknown(arguments.treatments)
    settings_tree(arguments.settings)
    return _job("tuning.replay", words, [], None, arguments.run)


_READERS = {"train": _train_command, "study": _study_command, "sweep": _sweep_command, "replay": _replay_command}
"""By the command line's name of what can be a job."""


def _refuse_print_config(given: bool, name: str) -> None:
    if given:
        raise UserError(f"--print-config: needs no job; steadymoe {name} --print-config shows the config")


def _job(
    module: str, words: Sequence[str], layers: Sequence[str], config: RunConfig | None, resume: str | None
) -> JobCommand:
    """The command with its files in the copy, and with absolute paths where ``config`` has relative ones."""
    files = dict.fromkeys(layer for layer in layers if layer.endswith(FILE_SUFFIX))
    # Under its own name, which the run is named after; numbered folders, for two may have the same.
    copies = {layer: f"{_FILES}/{number}/{Path(layer).name}" for number, layer in enumerate(files)}
    settings = _absolute_settings(config) if config is not None else []
    moved = [copies.get(word, word) for word in words]
    options = [word for setting in settings for word in ("--set", setting)]
    return JobCommand(module, moved + options, {copies[layer]: Path(layer) for layer in files}, resume)


def pack(command: JobCommand, folder: Path) -> None:
    """Copy the packages and the user's files to an empty folder, which becomes the job's working directory.

    The packages alone, by name: the project's root may hold corpora, runs and the cluster's token.
    """
    root = Path(pipelines.__file__).parents[1]
    for package in PACKAGES:
        shutil.copytree(root / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name, source in command.files.items():
        (folder / name).parent.mkdir(parents=True)
        shutil.copy(source, folder / name)


def _checked(arguments: TrainArguments) -> RunConfig:
    """The config of the run, or one with the settings of a run to resume, whose own may be out of reach from here."""
    if arguments.resume is None:
        return arguments.config()
    # How many steps are too few, the run's own warm-up decides.
    return load_config([], ["schedule.warmup_steps=0", *arguments.settings])


def _absolute_settings(config: RunConfig) -> list[str]:
    """Settings that replace relative paths of a config, which would point into the copy, by absolute ones."""
    uri = config.tracking.uri
    if uri and uri.startswith(SQLITE):
        uri = SQLITE + os.path.abspath(uri.removeprefix(SQLITE))
    moved = config.model_copy(
        update={
            "data": absolute_paths(config.data),
            "tracking": config.tracking.model_copy(update={"uri": uri}),
        }
    )
    before, after = config.model_dump(mode="json"), moved.model_dump(mode="json")
    # JSON is YAML.
    return [
        f"{'.'.join(key)}={json.dumps(_at(after, key), ensure_ascii=False)}"
        for key in _PATHS
        if _at(after, key) != _at(before, key)
    ]


def _at(tree: Any, key: tuple[str, ...]) -> Any:
    """The value of a key; None where another kind of section has no such key."""
    for part in key:
        tree = tree.get(part, {})
    return tree or None


def _absolute_option(words: Sequence[str], name: str) -> list[str]:
    """The words of a command with the path after the option ``name`` made absolute."""
    moved: list[str] = []
    for word in words:
        option, equals, value = word.partition("=")
        if moved[-1:] == [name]:
            moved.append(absolute(word))
        elif option == name and equals:
            moved.append(f"{option}={absolute(value)}")
        else:
            moved.append(word)
    return moved
