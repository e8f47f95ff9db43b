"""What a sweep is: a search space over keys of a run's config, who searches it, who prunes, and what is best.

A sweep is a YAML file of `SweepConfig`. A configuration is one point of the space; a trial is a configuration with one
seed, and a training run like any other. Imports no torch.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from moe.config.base import Config
from tuning.measure_names import MeasureName
from tuning.space_config import Dimension, check_space

Tree = dict[str, Any]


class GridSearcherConfig(Config):
    """Every combination of the values, in an order of its own: neighbours in the space are alike, and a scheduler that
    met all of the good ones first would prune nothing."""

    kind: Literal["grid"] = "grid"
    seed: NonNegativeInt = 0
    """Of the order."""


class RandomSearcherConfig(Config):
    """Independent draws."""

    kind: Literal["random"] = "random"
    seed: NonNegativeInt = 0


class TpeSearcherConfig(Config):
    """Optuna's tree-structured Parzen estimator, constraints included (Bergstra et al., NeurIPS 2011)."""

    kind: Literal["tpe"] = "tpe"
    seed: NonNegativeInt = 0
    startup_trials: PositiveInt = 10
    """Configurations drawn at random before it has a model of the space."""


class MultiObjectiveSearcherConfig(Config):
    """Optuna's estimator for several objectives at once: validation loss and ``objective.further``."""

    kind: Literal["multi_objective"] = "multi_objective"
    seed: NonNegativeInt = 0
    startup_trials: PositiveInt = 10
    """Configurations drawn at random before it has a model of the space."""


SearcherConfig = Annotated[
    GridSearcherConfig | RandomSearcherConfig | TpeSearcherConfig | MultiObjectiveSearcherConfig,
    Field(discriminator="kind"),
]


class NoSchedulerConfig(Config):
    """Every trial trains to its end."""

    kind: Literal["none"] = "none"


class AshaSchedulerConfig(Config):
    """Asynchronous successive halving by Ray Tune (arXiv 1810.05934): at each rung a trial ends that is not among the
    best ``1 / reduction`` of those that have come so far. The clock is the optimizer step, and each rung validates."""

    kind: Literal["asha"] = "asha"
    first_rung: PositiveInt | None = None
    """Optimizer steps; None is twice the longest warm-up in the space, at least a tenth of the steps. A rung within a
    warm-up would end long warm-ups by construction, which lose early and win late, so that is refused."""
    reduction: Annotated[int, Field(ge=2)] = 3
    """Each rung lies at so many times the steps of the one before."""


class PbtSchedulerConfig(Config):
    """Population based training by Ray Tune (arXiv 1711.09846): after each interval the worst trials go on from the
    checkpoints of the best, with values near theirs. What comes out is a schedule of values rather than a value."""

    kind: Literal["pbt"] = "pbt"
    interval_steps: PositiveInt
    """Optimizer steps between exploits; all trials wait for each other there. Above the longest warm-up in the space: a
    trial with a longer one would be replaced by construction."""
    quantile: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    """The share of trials that are replaced, and of those that replace them."""
    resample_probability: Annotated[float, Field(ge=0, le=1)] = 0.25
    """With which a value is drawn anew; otherwise a number is multiplied by 0.8 or 1.2, and one of a list moves to a
    neighbour."""
    seed: NonNegativeInt = 0


SchedulerConfig = Annotated[
    NoSchedulerConfig | AshaSchedulerConfig | PbtSchedulerConfig,
    Field(discriminator="kind"),
]


class ObjectiveConfig(Config):
    """What is best: the least validation loss among trials that keep the constraints. A diverged trial is the last."""

    constraints: dict[MeasureName, NonNegativeFloat] = Field(default={})
    """Measures and the most that each may be; a configuration that exceeds one ranks after all that do not."""
    further: list[MeasureName] = Field(default=[])
    """Measures to be small as well; searcher ``multi_objective`` looks for the whole front."""

    @model_validator(mode="after")
    def _says_nothing_twice(self) -> Self:
        for name in ("val_loss", "diverged"):
            if name in self.further or name in self.constraints:
                raise ValueError(f"{name}: is part of every sweep's objective; leave it out")
        return self


class ConfirmConfig(Config):
    """A final in which the best configurations train to their end with the same seeds, so that luck is seen.

    Only what was in it can be the best, unless none of it keeps all constraints.
    """

    top: Annotated[int, Field(ge=2)] = 2
    """Configurations in it."""
    seeds: Annotated[int, Field(ge=2)] = 3
    """Of each of them, the ones that it has been trained with included."""


class BudgetConfig(Config):
    """When no further trial is begun. Those that run are finished, and so is the final."""

    trials: PositiveInt | None = None
    """Trials of the search; a grid ends by itself."""
    tokens: PositiveInt | None = None
    """Training tokens of the whole sweep, resumed ones included; what the final reads is kept for it."""
    minutes: PositiveFloat | None = None
    """Of the whole sweep, resumed ones included; what the final takes at the pace so far is kept for it."""
    tokens_per_trial: PositiveInt | None = None
    """Instead of ``schedule.steps``: as many whole steps as read at most so many tokens. Needed where the space changes
    the batch, so that losses are of equal amounts of text; there it must be whole steps of every batch size."""


class SweepConfig(Config):
    """One sweep."""

    title: str = Field(min_length=1)
    question: str = Field(min_length=1)
    """What it is to answer, in a sentence or two."""
    base: list[str] = Field(min_length=1)
    """Presets of runs, or files, that all trials stand on."""
    config: Tree = Field(default={})
    """Keys of the run's config, on top of those."""
    settings: list[str] = Field(default=[])
    """``key=value`` each, on top of those: what the command's ``--set`` gave."""
    space: dict[str, Dimension] = Field(min_length=1)
    """Dotted keys of the run's config, and what values they may have."""
    searcher: SearcherConfig = Field(default=GridSearcherConfig())
    scheduler: SchedulerConfig = Field(default=NoSchedulerConfig())
    objective: ObjectiveConfig = Field(default=ObjectiveConfig())
    seeds: PositiveInt = 1
    """Of each configuration, counted on from ``seed`` of the base; its losses are averaged over them."""
    confirm: ConfirmConfig | None = None
    budget: BudgetConfig = Field(default=BudgetConfig())
    concurrent: PositiveInt | None = None
    """Trials at a time; None is as many as the cluster holds."""
    nested: bool = False
    """Whether each trial is a Ray Train run of its own, whose workers are started again one by one and which saves
    checkpoints as the base says: for trials so long that the ten seconds a trial which that costs do not count."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        check_space(self.space, grid=self.searcher.kind == "grid")
        if self.searcher.kind != "grid" and self.budget == BudgetConfig(tokens_per_trial=self.budget.tokens_per_trial):
            raise ValueError("budget: should have trials, tokens or minutes, for this searcher never ends by itself")
        if (self.searcher.kind == "multi_objective") != bool(self.objective.further):
            raise ValueError("objective.further: goes with searcher.kind=multi_objective, and only with that")
        if self.budget.trials is not None and self.budget.trials < self.seeds:
            raise ValueError(
                f"budget.trials: should be at least seeds ({self.seeds}), for one configuration takes those"
            )
        if self.confirm is not None and self.confirm.seeds <= self.seeds:
            raise ValueError(f"confirm.seeds: should be above seeds ({self.seeds}), or the final has nothing to train")
        return self

    @model_validator(mode="after")
    def _scheduler_fits(self) -> Self:
        if not isinstance(self.scheduler, PbtSchedulerConfig):
            return self
        if self.searcher.kind != "random":
            raise ValueError("searcher.kind: should be random with scheduler.kind=pbt, which searches by itself")
        if self.budget.trials is None or self.budget.trials < 2 or self.budget.tokens or self.budget.minutes:
            raise ValueError("budget: should be trials (the population, at least 2) alone with scheduler.kind=pbt")
        if self.seeds > 1 or self.confirm is not None:
            raise ValueError("seeds and confirm: do not go with scheduler.kind=pbt, whose values change on the way")
        if self.nested:
            raise ValueError("nested: does not go with scheduler.kind=pbt, whose trials pass on their states")
        if any(dimension.when for dimension in self.space.values()):
            raise ValueError("space: when does not go with scheduler.kind=pbt, whose values change on the way")
        return self
