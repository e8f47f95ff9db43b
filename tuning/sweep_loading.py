"""From a sweep's name or file to its config, and from that to the config of each trial. Imports no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipelines.config import RunConfig
from pipelines.errors import UserError
from pipelines.flatten import flatten
from pipelines.loading import SETTINGS, load_config, preset_names, read_document, settings_tree
from pipelines.problems import explain
from pipelines.sweep_view import SweptKey, swept_keys
from tuning.measure_names import OF_CLIP
from tuning.measures import warmup_steps, why_missing
from tuning.space import as_tree, corner_points, grid_points, label, random_point, short_names
from tuning.space_config import Values
from tuning.sweep_config import (
    AshaSchedulerConfig,
    GridSearcherConfig,
    MultiObjectiveSearcherConfig,
    NoSchedulerConfig,
    PbtSchedulerConfig,
    SweepConfig,
    TpeSearcherConfig,
    Tree,
)

SWEEPS = Path(__file__).parent / "presets" / "sweeps"

# What a trial has where the sweep does not say otherwise. An answer to a spike would hide what the values of the space
# do to it.
_TRIAL: Tree = {"response": {"kind": "record"}, "tracking": {"experiment": "steadymoe-sweeps"}}
# The state of a short trial is of no use to anybody.
_SHORT_TRIAL: Tree = {**_TRIAL, "checkpoint": {"every_steps": 0, "at_end": False}}
# Random points that are looked at before the first trial.
_PROBES = 100
# Sizes of a step that a message names.
_LISTED = 4


@dataclass(frozen=True)
class SweepPlan:
    """A sweep that holds, and what follows from it."""

    config: SweepConfig
    rungs: tuple[int, ...]
    """Optimizer steps at which trials are compared before their end, rising; none without a scheduler."""
    steps: int
    """Optimizer steps of a trial that is not ended early; the most that one has, if they differ."""
    points: int | None
    """Configurations of a grid; None with another searcher."""
    probe: Values
    """A point of the space: what is the same in all trials can be asked of it."""
    first_seed: int
    """The seeds of a configuration count on from it."""
    keys: tuple[SweptKey, ...]
    """What differs between its configurations, defaults of another kind of technique included."""
    names: Mapping[str, str]
    """Short names of the keys of the space, for labels."""

    def label(self, values: Values) -> str:
        """A point in few words."""
        return label(values, self.names)


def load_sweep(sweep: str, settings: Sequence[str] = (), **changed: Any) -> SweepPlan:
    """Read a sweep.

    Args:
        sweep: its name, or the path of a file that ends in ``.yaml``.
        settings: ``key=value`` each: keys of every run's config, over the sweep's own and under its space.
        changed: keys of the sweep to put in place of its own; a mapping changes the keys that it has.

    Raises:
        UserError: there is no such sweep, or it does not hold; one line a problem.
    """
    name, document = read_document(sweep, SWEEPS, "sweep")
    tree = dict(document.tree)
    for key, value in changed.items():
        known = tree.get(key)
        tree[key] = {**known, **value} if isinstance(value, dict) and isinstance(known, dict) else value
    if settings:
        own = tree.get("settings", [])
        tree["settings"] = [*own, *settings] if isinstance(own, list) else own
    origins = {path: f"{name}, line {line}" for path, line in document.lines.items()}
    try:
        return _plan(SweepConfig.model_validate(tree))
    except ValidationError as error:
        raise _of(name, explain(error, SweepConfig, origins)) from None
    except UserError as error:
        raise _of(name, str(error)) from None


def _of(sweep: str, problems: str) -> UserError:
    return UserError("\n".join(f"{sweep}: {line}" for line in problems.splitlines()))


def sweep_titles() -> list[tuple[str, str]]:
    """Names and titles of the sweeps that there are."""
    return [(name, load_sweep(name).config.title) for name in preset_names(SWEEPS)]


def plain_config(sweep: SweepConfig, values: Values) -> RunConfig:
    """A point of the space as a user would train it: without what a trial has besides.

    Raises:
        UserError: the point gives no config that holds; one line a problem, naming the key.
    """
    return _config(sweep, values)


def trial_config(plan: SweepPlan, values: Values, seed: int) -> RunConfig:
    """The config of one trial. UserError as `plain_config`."""
    own: dict[str, Tree] = {"seeds": {"seed": seed}}
    if plan.rungs:
        own["rungs"] = {"validation": {"at_steps": list(plan.rungs)}}
    if isinstance(plan.config.scheduler, PbtSchedulerConfig):
        # Whoever takes over a trial's state finds it as it was when they were compared.
        own["checkpoints"] = {"checkpoint": {"every_steps": plan.config.scheduler.interval_steps}}
    return _config(plan.config, values, _TRIAL if plan.config.nested else _SHORT_TRIAL, own)


def _config(
    sweep: SweepConfig, values: Values, below: Tree | None = None, above: Mapping[str, Tree] | None = None
) -> RunConfig:
    trees: dict[str, Tree] = {
        "default": below or {},
        "config": sweep.config,
        SETTINGS: settings_tree(sweep.settings),
        "space": as_tree(values),
        **(above or {}),
    }
    try:
        config = load_config(sweep.base, trees=trees)
        if (tokens := sweep.budget.tokens_per_trial) is not None:
            per_step = config.data.global_batch_size * config.data.sequence_length
            if tokens < per_step:
                raise UserError(f"budget.tokens_per_trial: should be at least {per_step:,}, which one step reads")
            trees["budget.tokens_per_trial"] = {"schedule": {"steps": tokens // per_step}}
            config = load_config(sweep.base, trees=trees)
    except UserError as error:
        raise _of(f"at {label(values, short_names(list(sweep.space)))}", str(error)) from None
    return config


def _points(sweep: SweepConfig) -> list[Values]:
    """Points that show what the space can do: all of a grid; the ends of the intervals and random ones otherwise."""
    if isinstance(sweep.searcher, GridSearcherConfig):
        return grid_points(sweep.space)
    probes = (random_point(sweep.space, sweep.searcher.seed, number) for number in range(_PROBES))
    return [*corner_points(sweep.space), *probes]


def _plan(sweep: SweepConfig) -> SweepPlan:
    """What would fail in some trial fails before the first. UserError if anything does not hold."""
    _refuse_hidden_keys(sweep)
    points = _points(sweep)
    configs = [_config(sweep, values) for values in points]
    _refuse_unequal_text(sweep, configs)
    _refuse_few_tokens(sweep, configs[0].tokens)
    _refuse_idle_searcher(sweep)
    _refuse_missing_measures(sweep, configs)
    rungs = _rungs(sweep, configs)
    return SweepPlan(
        config=sweep,
        rungs=tuple(rungs),
        steps=max(config.steps for config in configs),
        points=len(configs) if isinstance(sweep.searcher, GridSearcherConfig) else None,
        probe=points[0],
        first_seed=configs[0].seed,
        keys=swept_keys(map(flatten, configs)),
        names=short_names(list(sweep.space)),
    )


def _refuse_unequal_text(sweep: SweepConfig, configs: Sequence[RunConfig]) -> None:
    tokens = {config.tokens for config in configs}
    if len(tokens) > 1 and sweep.budget.tokens_per_trial is not None:
        steps = sorted({config.data.global_batch_size * config.data.sequence_length for config in configs})
        listed = ", ".join(f"{step:,}" for step in steps[:_LISTED]) + (" ..." if len(steps) > _LISTED else "")
        raise UserError(
            f"budget.tokens_per_trial: should be a multiple of {math.lcm(*steps):,}, for a step of a trial reads "
            f"{listed} tokens, and losses are compared after equal amounts of text"
        )
    if len(tokens) > 1:
        raise UserError(
            f"budget.tokens_per_trial: is needed, for points of this space read {min(tokens):,} to {max(tokens):,} "
            "tokens and their losses could not be compared"
        )
    batches = {config.data.global_batch_size for config in configs}
    if len(batches) > 1 and sweep.budget.tokens is not None:
        raise UserError(
            "budget.tokens: cannot be counted where data.global_batch_size is in the space; all trials read "
            "budget.tokens_per_trial tokens, so give budget.trials"
        )
    if len(batches) > 1 and not isinstance(sweep.scheduler, NoSchedulerConfig):
        raise UserError(
            "scheduler.kind: should be none where data.global_batch_size is in the space, for trials that are "
            "compared at one step would have read different amounts of text"
        )


def _refuse_few_tokens(sweep: SweepConfig, tokens: int) -> None:
    """The search could not begin, or would leave the final without configurations."""
    whole = sweep.confirm.top * sweep.confirm.seeds if sweep.confirm is not None else sweep.seeds
    if sweep.budget.tokens is not None and sweep.budget.tokens < whole * tokens:
        who = (
            f"the {sweep.confirm.top} configurations of the final read" if sweep.confirm else "one configuration reads"
        )
        raise UserError(f"budget.tokens: should be at least {whole * tokens:,}, which {who}")


def _refuse_missing_measures(sweep: SweepConfig, configs: Sequence[RunConfig]) -> None:
    """A measure that no trial has would count as kept, or as bad everywhere."""
    wanted = dict.fromkeys(sweep.objective.constraints, "constraints")
    wanted |= dict.fromkeys(sweep.objective.further, "further")
    for name, key in wanted.items():
        if name == "token_complexity":
            raise UserError(f"objective.{key}: token_complexity takes the reference arm of a study; leave it out")
        for config in configs:
            # A trial without a clip has none to act: it keeps any limit.
            if name not in OF_CLIP and (why := why_missing(name, config)) is not None:
                raise UserError(f"objective.{key}: trials have no {name}, for {why}")


def _refuse_idle_searcher(sweep: SweepConfig) -> None:
    searcher = sweep.searcher
    if not isinstance(searcher, TpeSearcherConfig | MultiObjectiveSearcherConfig) or sweep.budget.trials is None:
        return
    configurations = sweep.budget.trials // sweep.seeds
    if searcher.startup_trials >= configurations:
        raise UserError(
            f"searcher.startup_trials: {searcher.startup_trials} of {configurations} configurations would be "
            "random, so that nothing is learned; make it less, or budget.trials more"
        )


def _rungs(sweep: SweepConfig, configs: Sequence[RunConfig]) -> list[int]:
    steps, warm_up = min(config.steps for config in configs), max(map(warmup_steps, configs))
    match sweep.scheduler:
        case NoSchedulerConfig():
            return []
        case PbtSchedulerConfig(interval_steps=interval):
            key, rungs = "interval_steps", list(range(interval, steps, interval))
            _refuse_within_warm_up(key, interval, warm_up, "replace", "")
        case AshaSchedulerConfig() as asha:
            first = asha.first_rung or max(2 * warm_up, math.ceil(steps / 10), 1)
            _refuse_within_warm_up("first_rung", first, warm_up, "end", ", or leave it out")
            # As many as fit: each at `reduction` times the steps of the one before.
            powers = (first * asha.reduction**power for power in range(steps.bit_length()))
            key, rungs = "first_rung", [step for step in powers if step < steps]
    if not rungs:
        raise UserError(f"scheduler.{key}: no rung lies within the {steps} steps of a trial; make it less")
    return rungs


def _refuse_within_warm_up(key: str, first: int, warm_up: int, does: str, otherwise: str) -> None:
    """The first comparison of trials must see the learning rates that they are compared for."""
    if first <= warm_up:
        raise UserError(
            f"scheduler.{key}: {first} lies within the longest warm-up ({warm_up} steps), which would {does} "
            f"long warm-ups by construction; set it above {warm_up}{otherwise}"
        )


def _refuse_hidden_keys(sweep: SweepConfig) -> None:
    """What the space sets has no effect below it, nor the steps where tokens are given."""
    layers = {"config": sweep.config, SETTINGS: settings_tree(sweep.settings)}
    for layer, tree in layers.items():
        if sweep.budget.tokens_per_trial is not None and _sets(tree, "schedule.steps"):
            raise UserError(f"{layer}: schedule.steps has no effect beside budget.tokens_per_trial; leave one out")
        for key in sweep.space:
            if _sets(tree, key) and not sweep.space[key].when:
                raise UserError(f"{layer}: {key} has no effect, for the space sets it in all trials; leave it out")


def _sets(tree: Tree, key: str) -> bool:
    inner: Any = tree
    for part in key.split("."):
        inner = inner.get(part) if isinstance(inner, dict) else None
    return inner is not None
