"""What is refused of a study before its first trial: keys without effect, arms that cannot be compared, measures that
no run of theirs can have. Imports no torch."""

from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any

from pipelines.config import RunConfig
from pipelines.loading import PRESETS, SETTINGS, parse_setting, read_document, settings_tree
from tuning.measures import why_missing
from tuning.results import TrialKey
from tuning.study_config import Arm, StudyConfig, Tree

KeyPath = tuple[str, ...]

_ALIKE = {
    "data.corpus": "seeds are paired on the same text",
    "data.tokenizer": "seeds are paired on the same text",
    "data.document_token": "seeds are paired on the same text",
    "parallel": "all trials run in the same processes",
    "tracking.uri": "all trials have one parent run",
    "tracking.experiment": "all trials have one parent run",
}
_DECIDED: dict[KeyPath, str] = {
    ("seed",): "blocks count seeds on from first_seed",
    ("tracking", "run_name"): "trials are named by arm, point and seed",
}


def study_problems(study: StudyConfig, configs: Mapping[TrialKey, RunConfig]) -> Iterator[str]:
    """What is wrong with a study whose parts hold by themselves, a line each.

    Args:
        study: the study.
        configs: those of the trials of a block.
    """
    yield from _keys_without_effect(study)
    yield from _settings_without_effect(study)
    yield from _differences(configs)
    yield from _durations_without_steps(study, configs)
    yield from _measures_that_no_run_has(study, configs)


def _keys_without_effect(study: StudyConfig) -> Iterator[str]:
    decided = dict(_DECIDED)
    if study.grid is not None:
        decided[_path(study.grid.key)] = "the grid sets it in all trials"
    layers = {"config": study.config, SETTINGS: settings_tree(study.settings)}
    layers |= {f"arms.{name}.config": arm.config for name, arm in study.arms.items()}
    for layer, tree in layers.items():
        for path, why in decided.items():
            if _has(tree, path):
                yield f"{layer}: {'.'.join(path)} has no effect, for {why}; leave it out"
    for name, arm in study.arms.items():
        tuned = {"clip_rate_of": "stability.clip", "as_long_as": "schedule.steps"}
        for key, sets in tuned.items():
            if getattr(arm, key) is not None and _has(arm.config, _path(sets)):
                yield f"arms.{name}.config: {sets} has no effect, for {key} sets it; leave one of them out"


def _settings_without_effect(study: StudyConfig) -> Iterator[str]:
    arms = [_trees(arm) for arm in study.arms.values()]
    for setting in study.settings:
        path, value = parse_setting(setting)
        ends = list(_ends(value, path))
        if all(any(_has(tree, end) for tree in trees) for trees in arms for end in ends):
            yield f"{SETTINGS}: {'.'.join(path)} has no effect, for every arm sets it; leave it out"


def _differences(configs: Mapping[TrialKey, RunConfig]) -> Iterator[str]:
    (first, wanted), *others = configs.items()
    for key, why in _ALIKE.items():
        value = attrgetter(key)
        different = [other.name for other, config in others if value(config) != value(wanted)]
        if different:
            yield f"trial {different[0]}: {key} should be the same as in {first.name}, for {why}"


def _durations_without_steps(study: StudyConfig, configs: Mapping[TrialKey, RunConfig]) -> Iterator[str]:
    for key, config in configs.items():
        if study.arms[key.arm].as_long_as is not None and config.schedule.kind != "simple":
            yield f"arms.{key.arm}.as_long_as: needs schedule.kind=simple, whose steps it sets, not stages"
            return


def _measures_that_no_run_has(study: StudyConfig, configs: Mapping[TrialKey, RunConfig]) -> Iterator[str]:
    """The first place of each, for many claims may need the same measure."""
    needed = [
        (f"{path}.measure", quantity.measure, quantity.arm, quantity.possible_points(study.grid))
        for path, quantity in study.quantities()
    ]
    for name, arm in study.arms.items():
        if arm.clip_rate_of is not None:
            needed.append((f"arms.{name}.clip_rate_of", "clip_rate", arm.clip_rate_of, study.points()))
    told = set()
    for path, measure, arm_name, points in needed:
        for key in (TrialKey(study.first_seed, arm_name, point) for point in points):
            why = _why_missing(measure, configs[key], study)
            if why is not None and (measure, why) not in told:
                told.add((measure, why))
                yield f"{path}: {key.name} has no {measure}, for {why}"


def _why_missing(measure: str, config: RunConfig, study: StudyConfig) -> str | None:
    """Why a run that finishes cannot have the measure; None where it has."""
    if measure == "token_complexity" and (study.reference is None or study.blocks == 1):
        return "it needs the study's reference, an arm, and two blocks: the losses are those of another seed"
    return why_missing(measure, config)


def _trees(arm: Arm) -> Sequence[Tree]:
    """What an arm sets, presets included."""
    presets = [read_document(name, PRESETS, "preset")[1].tree for name in arm.base]
    return [*presets, arm.config]


def _path(key: str) -> KeyPath:
    return tuple(key.split("."))


def _has(tree: Any, path: KeyPath) -> bool:
    for key in path:
        if not isinstance(tree, dict) or key not in tree:
            return False
        tree = tree[key]
    return True


def _ends(value: Any, path: KeyPath) -> Iterator[KeyPath]:
    """The paths of all values under ``path`` that are no mappings."""
    if not isinstance(value, dict):
        yield path
        return
    for key, inner in value.items():
        yield from _ends(inner, (*path, key))
