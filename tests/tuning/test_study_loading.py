"""Names, files and --set become a study and the configs of its trials, or one clear line for a mistake."""

from pathlib import Path
from typing import Any

import pytest

from moe.config.clip import GlobalClipConfig, NoClipConfig, ZClipConfig
from pipelines.config import RunConfig
from pipelines.errors import UserError
from pipelines.loading import load_config, preset_names
from pipelines.yaml_text import dump
from tests.tuning.study_file import GRID, LEFT, RIGHT, STUDY, changed, write_study
from tuning.results import TrialKey
from tuning.study_config import StudyConfig
from tuning.study_loading import STUDIES, load_study, study_titles, trial_config, trial_configs

MEAN = {"kind": "mean"}
CONDITION = "claims.0.conditions.0"
ON_GRID = {"grid": GRID, f"{CONDITION}.left": {**LEFT, "over": MEAN}, f"{CONDITION}.right": {**RIGHT, "over": MEAN}}


def config_of(changes: dict[str, Any], arm: str = "a", **keys: Any) -> RunConfig:
    study = StudyConfig.model_validate(changed(changes))
    return trial_config(study, TrialKey(0, arm), **keys)


@pytest.mark.parametrize("name", preset_names(STUDIES))
def test_every_shipped_study_loads(name: str) -> None:
    study = load_study(name)
    assert len(trial_configs(study)) == len(study.arms) * len(study.points())


def test_shipped_studies_differ_in_nothing_but_what_their_arms_say() -> None:
    # The control of every comparison: an arm that sets nothing is the study's own config, and answers no spike.
    for name, arm in (("balance", "sign"), ("clip", "none"), ("warmup", "warmup-0")):
        study = load_study(name)
        assert study.arms[arm].config == {}
        point = study.points()[0]
        ours = trial_config(study, TrialKey(5, arm, point))
        lr = {"grid": {"optimizer": {"lr": point}}} if point is not None else {}
        assert ours == load_config(study.base, ["seed=5", "response.kind=record"], trees={"config": study.config, **lr})


def test_studies_are_listed_with_their_titles() -> None:
    titles = dict(study_titles())
    assert list(titles) == preset_names(STUDIES)
    assert titles["warmup"] == "Length of the warm-up"


def test_a_later_layer_wins(tmp_path: Path) -> None:
    # The first layer sets all keys to 1, the second all but the first to 2, and so on.
    keys = ["checkpoint.keep", "validation.every_steps", "tracking.every_steps", "checkpoint.every_steps",
            "checkpoint.confirm_steps"]  # fmt: skip

    def tree(layer: int) -> dict[str, Any]:
        sections: dict[str, Any] = {}
        for section, key in (dotted.split(".") for dotted in keys[layer:]):
            sections.setdefault(section, {})[key] = layer + 1
        return sections

    base, arm_base = str(tmp_path / "base.yaml"), str(tmp_path / "arm.yaml")
    for path, layer in ((base, 0), (arm_base, 3)):
        Path(path).write_text(dump(tree(layer)))
    config = config_of(
        {
            "base": ["micro", base],
            "config": tree(1),
            "settings": [f"{key}=3" for key in keys[2:]],
            "arms.a": {"says": "a", "base": [arm_base], "config": tree(4)},
        }
    ).model_dump()
    assert [config[section][key] for section, key in (dotted.split(".") for dotted in keys)] == [1, 2, 3, 4, 5]


def test_grid_and_seed_win_over_every_arm() -> None:
    study = StudyConfig.model_validate(
        changed({**ON_GRID, "config.seed": 5, "arms.a.config": {"seed": 6, "optimizer": {"lr": 0.5}}})
    )
    config = trial_config(study, TrialKey(9, "a", 0.01))
    assert (config.seed, config.optimizer.lr) == (9, 0.01)


def test_a_whole_number_of_the_grid_may_be_a_key_s_integer() -> None:
    grid = {"key": "schedule.warmup_steps", "values": [2, 5]}
    study = StudyConfig.model_validate(changed({**ON_GRID, "grid": grid}))
    assert [config.schedule for config in trial_configs(study)] == 2 * [
        load_config(["micro"], [f"schedule.warmup_steps={steps}"]).schedule for steps in (2, 5)
    ]


def test_another_kind_takes_nothing_over() -> None:
    zclip = {"stability": {"clip": {"kind": "zclip", "z_threshold": 3.0}}}
    plain = {"config": zclip, "arms.a.config": {"stability": {"clip": {"kind": "global"}}}}
    assert config_of(plain).stability.clip == GlobalClipConfig()
    same = {"config": zclip, "arms.a.config": {"stability": {"clip": {"kind": "zclip", "decay": 0.5}}}}
    assert config_of(same).stability.clip == ZClipConfig(z_threshold=3.0, decay=0.5)
    none = {"config": zclip, "settings": ["stability.clip.kind=none"]}
    assert config_of(none).stability.clip == NoClipConfig()


def test_a_tuned_arm_clips_the_global_norm_at_the_limit_that_was_found() -> None:
    tuned = {"arms.b": {"says": "b", "clip_rate_of": "a"}, "config": {"stability": {"clip": {"kind": "zclip"}}}}
    found = {"stability": {"clip": {"max_norm": 0.25}}}
    assert config_of(tuned, "b", matched=found).stability.clip == GlobalClipConfig(max_norm=0.25)
    assert config_of(tuned, "a").stability.clip == ZClipConfig()


def test_an_arm_that_lasts_as_long_as_another_takes_the_steps_that_were_found() -> None:
    tuned = {"arms.b": {"says": "b", "as_long_as": {"arm": "a", "paced_by": "a"}}}
    assert config_of(tuned, "b", matched={"schedule": {"steps": 321}}).steps == 321
    assert config_of(tuned, "b").steps == config_of(tuned, "a").steps != 321


@pytest.mark.parametrize("reverse", [False, True])
def test_settings_are_one_layer_whatever_their_order(reverse: bool) -> None:
    settings = ["stability.clip.kind=global", "stability.clip.max_norm=0.25"]
    none = {"config": {"stability": {"clip": {"kind": "none"}}}, "settings": settings[::-1] if reverse else settings}
    assert config_of(none).stability.clip == GlobalClipConfig(max_norm=0.25)


def test_settings_of_the_command_come_on_top_of_those_in_the_file(tmp_path: Path) -> None:
    path = write_study(tmp_path, {"settings": ["optimizer.lr=0.1", "optimizer.beta1=0.5"]})
    study = load_study(path, ["optimizer.lr=0.2"])
    optimizer = trial_configs(study)[0].optimizer
    assert (optimizer.lr, optimizer.beta1) == (0.2, 0.5)


def test_keys_of_the_study_can_be_replaced(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path, {"blocks": 3}), blocks=2, budget_minutes=7.0)
    assert (study.blocks, study.budget_minutes) == (2, 7.0)


def test_trials_may_differ_in_length(tmp_path: Path) -> None:
    path = write_study(tmp_path, {"arms.b.config": {"schedule": {"steps": 300}, "data": {"sequence_length": 32}}})
    short, long = trial_configs(load_study(path))
    assert (short.steps, long.steps) == (200, 300)


CLIP = {"arm": "a", "measure": "clip_rate"}
NO_CLIP = {"stability": {"clip": {"kind": "none"}}}
FEW = "its 60 steps are too few: the spike score begins at step 71"
MISTAKES: list[tuple[dict[str, Any], list[str], str]] = [
    # the study's own keys
    ({"titel": "x"}, [], "titel: unknown key; did you mean title? (set by {}, line 26)"),
    ({"title": None}, [], "title: is required here"),
    ({"blocks": 0}, [], "blocks: should be greater than 0, got 0 (set by {}, line 26)"),
    ({"base": []}, [], "base: should have at least 1 item, got 0 (set by {}, line 3)"),
    ({"base": "micro"}, [], "base: should be a list, got the text 'micro' (set by {}, line 3)"),
    ({"base": ["mikro"]}, [], "trial a-s0: unknown preset 'mikro'; did you mean micro?"),
    ({"shown": ["loss"]}, [], "shown.0: should be 'val_loss', "),
    # arms
    ({"arms": {"a": {"says": "x"}}}, [], "arms: should have at least 2 items, got 1"),
    ({"arms": ["a", "b"]}, [], "arms: should be a mapping of keys, got a list"),
    ({"arms.a": "x"}, [], "arms.a: should be a mapping of keys, got the text 'x' (set by {}, line 6)"),
    ({"arms.a.sais": "x"}, [], "arms.a.sais: unknown key; did you mean arms.a.says? (set by {}, line 8)"),
    ({"arms.a.says": None}, [], "arms.a.says: is required here"),
    ({"arms.a.config": ["x"]}, [], "arms.a.config: should be a mapping of keys, got a list"),
    ({"arms.x/y": {"says": "x"}}, [], "arms.x/y: a name should have no / and begin with neither . nor -"),
    ({"arms.a.base": ["recipes/plan"]}, [], "arms.a.base: unknown preset 'recipes/plan'; did you mean recipes/plain?"),
    ({"arms.b.clip_rate_of": "c"}, [], "arms.b.clip_rate_of: should be an arm that is not tuned itself, not 'c'"),
    ({"arms.b.clip_rate_of": "b"}, [], "arms.b.clip_rate_of: should be an arm that is not tuned itself, not 'b'"),
    ({"arms.b.as_long_as": {"arm": "a", "paced_by": "c"}}, [],
     "arms.b.as_long_as: should be an arm that is not tuned itself, not 'c'"),
    ({"arms.b": {"says": "b", "clip_rate_of": "a", "as_long_as": {"arm": "a", "paced_by": "a"}}}, [],
     "arms.b: as_long_as: does not go with clip_rate_of; leave one of them out"),
    # keys of the runs' config
    ({"config": {"lr": 1}}, [], "trial a-s0: lr: unknown key; did you mean optimizer.lr? (set by config)"),
    ({"arms.b.config": {"optimizer": {"lrr": 1}}}, [],
     "trial b-s0: optimizer.lrr: unknown key; did you mean optimizer.lr? (set by arms.b.config)"),
    ({"arms.b.config": {"stability": {"clip": {"kind": "zclp"}}}}, [],
     "trial b-s0: stability.clip.kind: 'zclp' is no kind of clip; did you mean zclip? (set by arms.b.config)"),
    ({}, ["lr=1"], "trial a-s0: lr: unknown key; did you mean optimizer.lr? (set by --set)"),
    ({}, ["optimizer.lr=fast"], "trial a-s0: optimizer.lr: should be a valid number, got the text 'fast'"),
    ({}, ["optimizer.lr"], "--set optimizer.lr: should be key=value"),
    ({**ON_GRID, "grid.key": "optimizer.lrr"}, [],
     "trial a-0.001-s0: optimizer.lrr: unknown key; did you mean optimizer.lr? (set by grid)"),
    ({**ON_GRID, "grid.key": "schedule.warmup_steps", "grid.values": [1.5, 2.0]}, [],
     "trial a-1.5-s0: schedule.warmup_steps: should be a valid integer, got 1.5 (set by grid)"),
    # the grid
    ({**ON_GRID, "grid.values": [0.01, 0.001]}, [], "grid: values should rise from one to the next"),
    ({**ON_GRID, "grid.values": [0.01, 0.01]}, [], "grid: values should rise from one to the next"),
    ({**ON_GRID, "grid.values": [0.01]}, [], "grid.values: should have at least 2 items, got 1"),
    ({**ON_GRID, "grid.values": [0.0, 0.1]}, [], "grid.values.0: should be greater than 0, got 0.0"),
    ({**ON_GRID, "grid.values": [0.1000001, 0.1000002]}, [], "grid: values should differ within 6 digits"),
    # claims
    ({"claims": STUDY["claims"] * 2}, [], "claims.1.name: 'c' is the name of another claim"),
    ({"claims": []}, [], "claims: should have at least 1 item, got 0"),
    ({f"{CONDITION}.left.arm": "c"}, [], f"{CONDITION}.left.arm: 'c' is none of the arms a, b"),
    ({"claims.0.exercised": [{"quantity": {**LEFT, "arm": "c"}}]}, [],
     "claims.0.exercised.0.quantity.arm: 'c' is none of the arms a, b"),
    ({f"{CONDITION}.right.measure": "los"}, [], f"{CONDITION}.right.measure: should be 'val_loss', "),
    ({f"{CONDITION}.right.mesure": "x"}, [],
     f"{CONDITION}.right.mesure: unknown key; did you mean {CONDITION}.right.measure?"),
    ({f"{CONDITION}.right": "b"}, [], f"{CONDITION}.right: should be a quantity (a mapping with arm and measure) or a"),
    ({f"{CONDITION}.right": True}, [], f"{CONDITION}.right: should be a quantity (a mapping with arm and measure) or"),
    ({f"{CONDITION}.relation": "less"}, [], f"{CONDITION}.relation: should be 'below', 'above', 'at_most' or 'within'"),
    ({f"{CONDITION}.relation": "within"}, [], f"{CONDITION}: tolerance goes with relation: within"),
    ({f"{CONDITION}.tolerance": 0.1}, [], f"{CONDITION}: tolerance goes with relation: within"),
    ({f"{CONDITION}.factor": 0}, [], f"{CONDITION}.factor: should be greater than 0, got 0"),
    # over the grid
    ({"grid": GRID}, [], f"{CONDITION}.left.over: is required with a grid"),
    ({f"{CONDITION}.left.over": MEAN}, [], f"{CONDITION}.left.over: has no effect without a grid"),
    ({**ON_GRID, f"{CONDITION}.left.over": {"kind": "men"}}, [],
     f"{CONDITION}.left.over.kind: 'men' is no kind of over; did you mean mean?"),
    ({**ON_GRID, f"{CONDITION}.left.over": {"points": 1}}, [],
     f"{CONDITION}.left.over.kind: is required here; possible: at, highest, best, mean, sensitivity, largest_stable"),
    ({**ON_GRID, f"{CONDITION}.left.over": "mean"}, [],
     f"{CONDITION}.left.over: should be a mapping of keys, got the text 'mean'; did you mean {{{{kind: mean}}}}?"),
    ({**ON_GRID, f"{CONDITION}.left.over": {"kind": "at", "value": 0.5}}, [],
     f"{CONDITION}.left.over.value: 0.5 is none of the grid's values [0.001, 0.01]"),
    ({**ON_GRID, f"{CONDITION}.left.over": {"kind": "highest", "points": 3}}, [],
     f"{CONDITION}.left.over.points: 3 is more than the 2 values"),
    ({**ON_GRID, f"{CONDITION}.left.over": {"kind": "largest_stable"}}, [],
     f"{CONDITION}.left.measure: should be diverged with over: {{{{kind: largest_stable}}}}"),
    # what cannot be compared
    ({"arms.b.config": {"data": {"corpus": {"kind": "stdlib", "include_tests": False}}}}, [],
     "trial b-s0: data.corpus should be the same as in a-s0, for seeds are paired on the same text"),
    ({"arms.b.config": {"data": {"tokenizer": "x.json"}}}, [], "trial b-s0: data.tokenizer should be the same"),
    ({"arms.b.config": {"data": {"document_token": "x"}}}, [], "trial b-s0: data.document_token should be the"),
    ({"arms.b.config": {"parallel": {"threads": 2}}}, [], "trial b-s0: parallel should be the same as in a-s0"),
    ({"arms.b.config": {"tracking": {"experiment": "x"}}}, [], "trial b-s0: tracking.experiment should be the same as"),
    # what no run has
    ({"config": NO_CLIP, f"{CONDITION}.left": CLIP}, [],
     f"{CONDITION}.left.measure: a-s0 has no clip_rate, for stability.clip.kind is none"),
    ({"config": NO_CLIP, "arms.b": {"says": "b", "clip_rate_of": "a"}}, [],
     "arms.b.clip_rate_of: a-s0 has no clip_rate, for stability.clip.kind is none"),
    ({"base": ["dense-tiny"], f"{CONDITION}.left.measure": "max_vio_late"}, [],
     f"{CONDITION}.left.measure: a-s0 has no max_vio_late, for model.moe.num_experts is 0"),
    ({f"{CONDITION}.left.measure": "loss_spikes", f"{CONDITION}.right.measure": "loss_spikes"},
     ["schedule.steps=60", "schedule.warmup_steps=20"],
     f"{CONDITION}.left.measure: a-s0 has no loss_spikes, for {FEW}"),
    # what has no effect
    ({}, ["seed=3"], "--set: seed has no effect, for blocks count seeds on from first_seed; leave it out"),
    ({"config": {"seed": 3}}, [], "config: seed has no effect, for blocks count seeds on"),
    ({"arms.b.config": {"seed": 3}}, [], "arms.b.config: seed has no effect, for blocks count seeds on"),
    ({}, ["tracking.run_name=x"], "--set: tracking.run_name has no effect, for trials are named by arm, point"),
    (ON_GRID, ["optimizer.lr=0.5"], "--set: optimizer.lr has no effect, for the grid sets it in all trials"),
    (ON_GRID, ["optimizer={{lr: 0.5, beta1: 0.5}}"], "--set: optimizer.lr has no effect, for the grid sets it in all"),
    ({**ON_GRID, "config": {"optimizer": {"lr": 1}}}, [], "config: optimizer.lr has no effect, for the grid sets it"),
    ({**ON_GRID, "arms.b.config": {"optimizer": {"lr": 1}}}, [], "arms.b.config: optimizer.lr has no effect, for the"),
    ({"arms.a.config": {"optimizer": {"weight_decay": 0}}}, ["optimizer.weight_decay=0.3"],
     "--set: optimizer.weight_decay has no effect, for every arm sets it"),
    ({"arms.b": {"says": "b", "as_long_as": {"arm": "a", "paced_by": "a"}, "config": {"schedule": {"steps": 50}}}}, [],
     "arms.b.config: schedule.steps has no effect, for as_long_as sets it"),
    ({"arms.b": {"says": "b", "clip_rate_of": "a", "config": NO_CLIP}}, [],
     "arms.b.config: stability.clip has no effect, for clip_rate_of sets it"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "settings", "line"), MISTAKES)
def test_a_mistake_is_one_line_that_names_file_and_key(
    changes: dict[str, Any], settings: list[str], line: str, tmp_path: Path
) -> None:
    path = write_study(tmp_path, changes)
    with pytest.raises(UserError) as caught:
        load_study(path, [setting.replace("{{", "{").replace("}}", "}") for setting in settings])
    found = str(caught.value)
    assert found.startswith(f"{path}: {line.format(path)}")
    assert "\n" not in found


def test_a_setting_that_one_arm_takes_has_an_effect(tmp_path: Path) -> None:
    first, second = trial_configs(load_study(write_study(tmp_path, {}), ["optimizer.weight_decay=0.3"]))
    assert (first.optimizer.weight_decay, second.optimizer.weight_decay) == (0.3, 0.2)
    # One key of two is enough.
    load_study(write_study(tmp_path, {}), ["optimizer={weight_decay: 0.3, beta1: 0.5}"])


def test_only_the_points_that_a_claim_needs_must_have_its_measure(tmp_path: Path) -> None:
    # The score begins at step 61.
    grid = {"key": "schedule.steps", "values": [60, 61]}
    scored = {"measure": "loss_spikes", "over": {"kind": "highest", "points": 1}}
    changes = {"grid": grid, "config": {"schedule": {"warmup_steps": 10}},
               f"{CONDITION}.left": {"arm": "a", **scored}, f"{CONDITION}.right": {"arm": "b", **scored}}  # fmt: skip
    load_study(write_study(tmp_path, changes))
    changes[f"{CONDITION}.right"] = {"arm": "b", **scored, "over": MEAN}
    with pytest.raises(UserError, match=rf"{CONDITION}.right.measure: b-60-s0 has no loss_spikes, for its 60 steps"):
        load_study(write_study(tmp_path, changes))


@pytest.mark.parametrize(
    ("study", "line"),
    [
        ("balanc", "unknown study 'balanc'; did you mean balance? Studies: balance, clip, "),
        ("missing.yaml", "missing.yaml: cannot be read: No such file"),
    ],
)
def test_a_study_that_is_not_there_is_named_with_what_is(study: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        load_study(study)
    assert str(caught.value).startswith(line)


def test_several_mistakes_are_a_line_each(tmp_path: Path) -> None:
    path = write_study(tmp_path, {"blocks": 0, "titel": "x", "arms.a.says": 1})
    with pytest.raises(UserError) as caught:
        load_study(path)
    lines = str(caught.value).splitlines()
    assert sorted(line.split(": ")[1] for line in lines) == ["arms.a.says", "blocks", "titel"]
