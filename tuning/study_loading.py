"""From a study's name or file to its config, and from that to the config of each trial. Imports no torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipelines.config import RunConfig
from pipelines.errors import UserError
from pipelines.loading import PRESETS, SETTINGS, load_config, nested, preset_names, read_document, settings_tree
from pipelines.problems import explain
from tuning.results import TrialKey
from tuning.study_checks import study_problems
from tuning.study_config import StudyConfig, Tree

STUDIES = Path(__file__).parent / "presets" / "studies"


def load_study(study: str, settings: Sequence[str] = (), **changed: Any) -> StudyConfig:
    """The config of a study.

    Args:
        study: its name, or the path of a file that ends in ``.yaml``.
        settings: ``key=value`` each: keys of every run's config, over the study's own and under its arms'.
        changed: keys of the study to put in place of its own.

    Raises:
        UserError: there is no such study, or it does not hold; one line a problem.
    """
    name, document = read_document(study, STUDIES, "study")
    tree = document.tree | changed
    if settings:
        own = tree.get("settings", [])
        tree["settings"] = [*own, *settings] if isinstance(own, list) else own
    origins = {path: f"{name}, line {line}" for path, line in document.lines.items()}
    try:
        config = StudyConfig.model_validate(tree)
    except ValidationError as error:
        raise _of(name, explain(error, StudyConfig, origins)) from None
    # A mistake in the last arm must not be found after the first ones have run.
    try:
        configs = {key: trial_config(config, key) for key in _block(config)}
    except UserError as error:
        raise _of(name, str(error)) from None
    if problems := list(study_problems(config, configs)):
        raise _of(name, "\n".join(problems))
    return config


def _of(study: str, problems: str) -> UserError:
    return UserError("\n".join(f"{study}: {line}" for line in problems.splitlines()))


# An arm is to show what it does to spikes, which an answer to them would hide.
_DEFAULT: Tree = {"response": {"kind": "record"}}


def trial_configs(study: StudyConfig) -> list[RunConfig]:
    """The configs of one block."""
    return [trial_config(study, key) for key in _block(study)]


def _block(study: StudyConfig) -> list[TrialKey]:
    return [TrialKey(study.first_seed, arm, point) for arm in study.arms for point in study.points()]


def study_titles() -> list[tuple[str, str]]:
    """Names and titles of the studies that there are."""
    return [(name, load_study(name).title) for name in preset_names(STUDIES)]


def trial_config(study: StudyConfig, key: TrialKey, matched: Tree | None = None) -> RunConfig:
    """The config of one trial.

    Args:
        study: the study.
        key: the trial.
        matched: what an arm that is tuned to another takes from that one's results (`tuning.matching`).

    Raises:
        UserError: it does not hold; one line a problem, naming the part of the study.
    """
    arm = study.arms[key.arm]
    trees: dict[str, Tree] = {"default": _DEFAULT, "config": study.config, SETTINGS: settings_tree(study.settings)}
    for preset in arm.base:
        try:
            name, document = read_document(preset, PRESETS, "preset")
        except UserError as error:
            raise _of(f"arms.{key.arm}.base", str(error)) from None
        trees[name] = document.tree
    trees[f"arms.{key.arm}.config"] = arm.config
    if arm.clip_rate_of is not None:
        trees[f"arms.{key.arm}.clip_rate_of"] = {"stability": {"clip": {"kind": "global"}}}
    if matched:
        trees["matched"] = matched
    if study.grid is not None:
        trees["grid"] = nested(tuple(study.grid.key.split(".")), _plain(key.point))
    trees["seeds"] = {"seed": key.seed}
    try:
        return load_config(study.base, trees=trees)
    except UserError as error:
        raise _of(f"trial {key.name}", str(error)) from None


def _plain(point: float | None) -> float | int | None:
    """A whole number as an integer, which may stand for a float but not the other way round."""
    return int(point) if point is not None and point.is_integer() else point
