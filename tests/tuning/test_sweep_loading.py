"""Names, files and --set become a sweep and the configs of its trials, or one clear line for a mistake."""

import math
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import UserError
from pipelines.loading import load_config, preset_names
from tests.tuning.sweep_file import GRID, RANDOM, RATES, SWEEP, TPE, plan_of
from tuning.space import corner_points, grid_points
from tuning.sweep_loading import SWEEPS, load_sweep, plain_config, sweep_titles, trial_config

ASHA = {"kind": "asha"}
PBT = {**RANDOM, "scheduler": {"kind": "pbt", "interval_steps": 20}}
CLIPS = {"kind": "choice", "values": [{"kind": "none"}, {"kind": "global", "max_norm": 1.0}]}
LR = "optimizer.lr"
WARMUPS = {"schedule.warmup_steps": {"kind": "grid", "values": [4, 30]}}
NO_WARMUP = {"config": {"schedule": {"steps": 100}}}
BATCHES = {"data.global_batch_size": {"kind": "grid", "values": [4, 8, 16]}}
NO_STEPS = {"config": {"schedule": {"warmup_steps": 2}, "data": {"sequence_length": 64}}}


def two(**other: Any) -> dict[str, Any]:
    """A space of the LR and another key, whose name has its dots as double underscores."""
    return {"space": {**GRID, **{key.replace("__", "."): value for key, value in other.items()}}}


def numbers(*values: float, **more: Any) -> dict[str, Any]:
    return {"kind": "grid", "values": list(values), **more}


@pytest.mark.parametrize("name", preset_names(SWEEPS))
def test_every_shipped_sweep_loads_and_is_first_judged_after_its_longest_warm_up(name: str) -> None:
    plan = load_sweep(name)
    points = grid_points(plan.config.space) if plan.points is not None else list(corner_points(plan.config.space))
    configs = [plain_config(plan.config, values) for values in points]
    # `warmup_steps` as the file or its base has it: no preset of a sweep is written in stages.
    longest = max(config.model_dump()["schedule"]["warmup_steps"] for config in configs)
    assert all(rung > longest for rung in plan.rungs)
    assert {config.steps for config in configs} <= set(range(1, plan.steps + 1))
    assert name in dict(sweep_titles())


def test_the_grid_of_stability_is_all_of_three_by_two_by_two_by_two() -> None:
    plan = load_sweep("stability")
    assert (plan.points, plan.rungs, plan.steps) == (24, (22, 110), 256)


@pytest.mark.parametrize(
    ("scheduler", "steps", "rungs"),
    [
        ({"kind": "none"}, 100, ()),
        ({"kind": "asha", "first_rung": 5, "reduction": 2}, 100, (5, 10, 20, 40, 80)),
        ({"kind": "asha", "first_rung": 5, "reduction": 2}, 80, (5, 10, 20, 40)),  # the end validates in any case
        ({"kind": "asha"}, 100, (10, 30, 90)),  # a tenth of the steps
        ({"kind": "asha"}, 60, (8, 24)),  # twice the warm-up of 4
    ],
)
def test_rungs_grow_by_the_reduction_as_far_as_they_lie_within_the_steps(
    tmp_path: Path, scheduler: dict[str, Any], steps: int, rungs: tuple[int, ...]
) -> None:
    config = {"schedule": {"steps": steps, "warmup_steps": 4}}
    assert plan_of(tmp_path, {"config": config, "scheduler": scheduler}).rungs == rungs


def test_a_population_is_compared_after_every_interval(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, PBT)
    assert plan.rungs == (20, 40, 60, 80)
    config = trial_config(plan, {LR: 0.001}, 0)
    assert (config.checkpoint.every_steps, config.validation.at_steps) == (20, [20, 40, 60, 80])


def test_a_trial_is_its_point_over_the_settings_over_the_sweep_over_its_base(tmp_path: Path) -> None:
    changes = {
        "config": {**SWEEP["config"], "optimizer": {"beta1": 0.5, "beta2": 0.6}},
        "settings": ["optimizer.beta2=0.7", "seed=5"],
        "space": {**GRID, "stability.clip": CLIPS},
        "scheduler": {"kind": "asha", "first_rung": 50},
    }
    plan = plan_of(tmp_path, changes)
    values = {LR: 0.01, "stability.clip": {"kind": "global", "max_norm": 1.0}}
    wanted = [
        "schedule.steps=100",
        "schedule.warmup_steps=4",
        "optimizer.beta1=0.5",
        "optimizer.beta2=0.7",
        "optimizer.lr=0.01",
        "stability.clip={kind: global, max_norm: 1.0}",
    ]
    assert plan.first_seed == 5
    assert plain_config(plan.config, values) == load_config(["micro"], [*wanted, "seed=5"])
    # A trial has a seed of its own, is looked at where it is compared, and records spikes instead of answering them.
    own = [
        "seed=8",
        "validation.at_steps=[50]",
        "response={kind: record}",
        "checkpoint.every_steps=0",
        "checkpoint.at_end=false",
        "tracking.experiment=steadymoe-sweeps",
    ]
    assert trial_config(plan, values, 8) == load_config(["micro"], [*wanted, *own])


def test_tokens_per_trial_gives_every_batch_size_the_same_text(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, {**NO_STEPS, "space": BATCHES, "budget": {"tokens_per_trial": 65_536}})
    configs = [trial_config(plan, point, 0) for point in grid_points(plan.config.space)]
    assert sorted(config.steps for config in configs) == [64, 128, 256]
    assert {config.steps * config.data.global_batch_size * 64 for config in configs} == {65_536}
    assert plan.steps == 256


def test_tokens_per_trial_of_one_batch_size_are_rounded_down_to_whole_steps(tmp_path: Path) -> None:
    changes = {**NO_STEPS, "settings": ["data.global_batch_size=8"], "budget": {"tokens_per_trial": 70_000}}
    assert plan_of(tmp_path, changes).steps == 70_000 // (8 * 64) == 136


def test_what_the_command_gives_takes_the_place_of_the_file_s_own(tmp_path: Path) -> None:
    file = str(tmp_path / "mine.yaml")
    plan_of(tmp_path, {**RANDOM, "settings": ["seed=3"], "budget": {"trials": 8, "minutes": 5}})
    plan = load_sweep(file, ["seed=4"], budget={"trials": 20})
    assert (plan.config.budget.trials, plan.config.budget.minutes) == (20, 5)
    assert (plan.config.settings, plan.first_seed) == (["seed=3", "seed=4"], 4)


OF_THE_SPACE: list[tuple[dict[str, Any], str]] = [
    (two(optimizer__lrr=numbers(1, 2)), "at lr=0.001 lrr=1: optimizer.lrr: unknown key; did you mean optimizer.lr?"),
    (two(seed=numbers(1, 2)), "space.seed: cannot be swept: use seeds, or config.seed for the first of them"),
    (two(parallel__workers=numbers(1, 2)), "space.parallel.workers: cannot be swept: one sweep has one number of wor"),
    (two(schedule__steps=numbers(10, 20)), "space.schedule.steps: cannot be swept: losses would be of other amounts"),
    (two(validation__max_tokens=numbers(1024, 2048)), "space.validation.max_tokens: cannot be swept: losses would be"),
    (two(data__sequence_length=numbers(32, 64)), "space.data.sequence_length: cannot be swept, for losses would be of"),
    (two(tracking__experiment=numbers(1, 2)), "space.tracking.experiment: cannot be swept: it changes nothing that"),
    ({"space": {**GRID, "optimizer.": numbers(1, 2)}}, "space.optimizer.: should be a dotted key of a run's config"),
    ({"space": {}}, "space: should"),
    ({"objective": {"constraints": {"max_vio": 1.0}}}, "objective.constraints.max_vio: unknown; did you mean max_vio_"),
    ({"space": {LR: {"kind": "grids", "values": [1, 2]}}}, "space.optimizer.lr.kind: 'grids' is no kind of space; did"),
    ({"space": {LR: {"kind": "grid", "values": [1, "a"]}}}, "space.optimizer.lr: values: should be finite numbers"),
    ({"space": {LR: numbers(0.1, math.inf)}}, "space.optimizer.lr: values: should be finite numbers, and inf is none"),
    ({"space": {LR: numbers(0.001)}}, "space.optimizer.lr.values: should have at least 2 items, got 1"),
    ({"space": {LR: numbers(0.1, 0.1)}}, "space.optimizer.lr: values: 0.1 is there twice"),
    (
        {**RANDOM, "space": {LR: {**RATES[LR], "low": 1.0}}},
        "space.optimizer.lr: low should be below high, and they are",
    ),
    ({**RANDOM, "space": {LR: {**RATES[LR], "low": 0.0}}}, "space.optimizer.lr.low: should be greater than 0"),
    ({**RANDOM, "space": {LR: {**RATES[LR], "hihg": 1}}}, "space.optimizer.lr.hihg: unknown key; did you mean"),
    (
        {**RANDOM, "space": {"a.b": {"kind": "int", "low": 0, "high": 4, "log": True}}},
        "space.a.b: low: should be at least 1 with log, not 0",
    ),
    ({"space": RATES}, "space.optimizer.lr.kind: should be grid or choice with searcher.kind=grid"),
    ({**RANDOM, "space": GRID}, "space.optimizer.lr.kind: grid goes with searcher.kind=grid; use choice"),
    (
        two(optimizer__beta2=numbers(0.9, 0.95, when={"optimizer.beta1": [1]})),
        "space.optimizer.beta2.when: 'optimizer.beta1' is no key of the space: optimizer.lr, optimizer.beta2",
    ),
    (
        two(optimizer__beta2=numbers(0.9, 0.95, when={LR: [0.001, 0.5]})),
        "space.optimizer.beta2.when.optimizer.lr: 0.5 is none of [0.001, 0.01]",
    ),
    (
        two(optimizer__beta2=numbers(0.9, 0.95, when={LR: []})),
        "space.optimizer.beta2.when.optimizer.lr: should list values with which",
    ),
    (
        two(
            optimizer__beta1=numbers(0.8, 0.9, when={"optimizer.beta2": [0.9]}),
            optimizer__beta2=numbers(0.9, 0.95, when={"optimizer.beta1": [0.8]}),
        ),
        "space.optimizer.beta1.when: the conditions of optimizer.beta1, optimizer.beta2 wait for each other",
    ),
    (
        {**RANDOM, "space": {**RATES, "a": {"kind": "choice", "values": [1, 2], "when": {LR: [0.001]}}}},
        "space.a.when.optimizer.lr: should name a key of kind choice or grid",
    ),
    (
        two(stability__clip=CLIPS, stability__clip__max_norm=numbers(1, 2)),
        "space.stability.clip.max_norm: is inside stability.clip, whose values are whole sections",
    ),
    # What holds by itself, but not with the rest of the run's config at some point.
    (
        two(stability__clip__kind={"kind": "choice", "values": ["none", "globl"]}),
        "at lr=0.001 clip=globl: stability.clip.kind: 'globl' is no kind of clip; did you mean global?",
    ),
    ({**two(**{"schedule.warmup_steps": numbers(4, 400)}), **NO_WARMUP}, "at lr=0.001 warmup_steps=400: schedule"),
]

OF_THE_REST: list[tuple[dict[str, Any], str]] = [
    ({"titel": "x"}, "titel: unknown key; did you mean title?"),
    ({"title": None}, "title: is required here"),
    ({"base": []}, "base: should have at least 1 item, got 0"),
    ({"base": ["mikro"]}, "at lr=0.001: unknown preset 'mikro'; did you mean micro?"),
    ({"config": {"optimiser": {"lr": 1}}}, "at lr=0.001: optimiser: unknown key; did you mean optimizer?"),
    ({"config": {"optimizer": {"lr": 0.1}}}, "config: optimizer.lr has no effect, for the space sets it in all trials"),
    ({"settings": ["optimizer.lr=0.1"]}, "--set: optimizer.lr has no effect, for the space sets it in all trials"),
    ({"settings": ["optimizer.lr"]}, "--set optimizer.lr: should be key=value"),
    (
        {"space": {"stability.clip": CLIPS}, "config": {"stability": {"clip": {"max_norm": 2.0}}}},
        "config: stability.clip has no effect",
    ),
    ({"searcher": {"kind": "tpe"}}, "space.optimizer.lr.kind: grid goes with searcher.kind=grid; use choice"),
    ({"searcher": {"kind": "tpee"}}, "searcher.kind: 'tpee' is no kind of searcher; did you mean tpe?"),
    ({"searcher": {"kind": "random", "startup_trials": 3}}, "searcher.startup_trials: "),
    ({**RANDOM, "budget": None}, "budget: should have trials, tokens or minutes, for this searcher never ends by"),
    ({**RANDOM, "budget": {"tokens_per_trial": 50_000}}, "budget: should have trials, tokens or minutes"),
    ({**RANDOM, "seeds": 9}, "budget.trials: should be at least seeds (9)"),
    ({**TPE, "budget": {"trials": 8}, "seeds": 2}, "searcher.startup_trials: 4 of 4 configurations would be random"),
    ({**TPE, "searcher": {"kind": "multi_objective"}}, "objective.further: goes with searcher.kind=multi_objective"),
    ({**TPE, "objective": {"further": ["dead_experts"]}}, "objective.further: goes with searcher.kind=multi_objective"),
    ({"objective": {"constraints": {"val_loss": 3}}}, "objective: val_loss: is part of every sweep's objective"),
    ({"objective": {"constraints": {"dead_expert": 0}}}, "objective.constraints"),
    ({"objective": {"constraints": {"dead_experts": -1}}}, "objective.constraints.dead_experts: should be greater"),
    ({"scheduler": {"kind": "asha", "firstrung": 8}}, "scheduler.firstrung: unknown key; did you mean scheduler.first"),
    ({"scheduler": {**ASHA, "reduction": 1}}, "scheduler.reduction: should be greater than or equal to 2"),
    (
        {**NO_WARMUP, "space": WARMUPS, "scheduler": {**ASHA, "first_rung": 30}},
        "scheduler.first_rung: 30 lies within the longest warm-up (30 steps), which would end long warm-ups by",
    ),
    ({"scheduler": {**ASHA, "first_rung": 100}}, "scheduler.first_rung: no rung lies within the 100 steps of a trial"),
    ({**PBT, "scheduler": {"kind": "pbt", "interval_steps": 100}}, "scheduler.interval_steps: no rung lies within"),
    (
        {**PBT, "config": {"schedule": {"steps": 100, "warmup_steps": 20}}},
        "scheduler.interval_steps: 20 lies within the longest warm-up (20 steps), which would replace long warm-ups by",
    ),
    ({**PBT, "searcher": {"kind": "tpe"}}, "searcher.kind: should be random with scheduler.kind=pbt"),
    ({**PBT, "budget": {"trials": 1}}, "budget: should be trials (the population, at least 2) alone"),
    ({**PBT, "budget": {"trials": 4, "minutes": 5}}, "budget: should be trials (the population, at least 2) alone"),
    ({**PBT, "nested": True}, "nested: does not go with scheduler.kind=pbt"),
    ({**PBT, "confirm": {}}, "seeds and confirm: do not go with scheduler.kind=pbt"),
    (
        {
            **PBT,
            "space": {
                "stability.clip": CLIPS,
                LR: {"kind": "choice", "values": [0.1, 0.2], "when": {"stability.clip": [{"kind": "none"}]}},
            },
        },
        "space: when does not go with scheduler.kind=pbt",
    ),
    ({"seeds": 3, "confirm": {"seeds": 3}}, "confirm.seeds: should be above seeds (3)"),
    ({"confirm": {"top": 1}}, "confirm.top: should be greater than or equal to 2"),
    ({**NO_STEPS, "space": BATCHES}, "budget.tokens_per_trial: is needed, for points of this space read "),
    ({"budget": {"tokens_per_trial": 50_000}}, "config: schedule.steps has no effect beside budget.tokens_per_trial"),
    (
        {**NO_STEPS, "space": BATCHES, "budget": {"tokens_per_trial": 65_536}, "scheduler": ASHA},
        "scheduler.kind: should be none where data.global_batch_size is in the space",
    ),
    (
        {**NO_STEPS, "space": BATCHES, "budget": {"tokens_per_trial": 65_536, "tokens": 10**6}},
        "budget.tokens: cannot be counted where data.global_batch_size is in the space",
    ),
    (
        {**NO_STEPS, "space": BATCHES, "budget": {"tokens_per_trial": 70_000}},
        "budget.tokens_per_trial: should be a multiple of 1,024, for a step of a trial reads 256, 512, 1,024 tokens",
    ),
    # 512 divides 64,000, and 768 does not.
    (
        {
            **NO_STEPS,
            "space": {"data.global_batch_size": {"kind": "grid", "values": [8, 12]}},
            "budget": {"tokens_per_trial": 64_000},
        },
        "budget.tokens_per_trial: should be a multiple of 1,536, for a step of a trial reads 512, 768 tokens",
    ),
    (
        {**NO_STEPS, "settings": ["data.global_batch_size=8"], "budget": {"tokens_per_trial": 500}},
        "at lr=0.001: budget.tokens_per_trial: should be at least 512, which one step reads",
    ),
    (
        {**NO_STEPS, "settings": ["data.global_batch_size=8", "schedule.steps=10"], "budget": {"tokens": 5119}},
        "budget.tokens: should be at least 5,120, which one configuration reads",
    ),
    (
        {
            **NO_STEPS,
            "settings": ["data.global_batch_size=8", "schedule.steps=10"],
            "budget": {"tokens": 30_000},
            "confirm": {"top": 2, "seeds": 3},
        },
        "budget.tokens: should be at least 30,720, which the 2 configurations of the final read",
    ),
    ({"concurrent": 0}, "concurrent: should be greater than 0"),
]


@pytest.mark.parametrize(("changes", "line"), OF_THE_SPACE + OF_THE_REST)
def test_what_does_not_hold_is_said_before_the_first_trial(tmp_path: Path, changes: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        plan_of(tmp_path, changes)
    file = str(tmp_path / "mine.yaml")
    lines = str(caught.value).splitlines()
    assert all(one.startswith(f"{file}: ") for one in lines)
    assert lines[0].removeprefix(f"{file}: ").startswith(line)


def test_several_mistakes_are_said_at_once_with_their_lines(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        plan_of(tmp_path, {"question": "", "seeds": 0})
    first, second = str(caught.value).splitlines()
    assert "question: should" in first
    assert f"(set by {tmp_path / 'mine.yaml'}, line 2)" in first
    assert "seeds: should be greater than 0" in second
