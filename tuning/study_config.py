"""What a study is: arms of a claim over paired seeds, what is measured of each, and what must come out.

A study is a YAML file of `StudyConfig`. A block is one seed through every arm and every point of the grid, on the same
data and the same starting weights, so that arms are compared seed by seed.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, NonNegativeInt, PositiveFloat, PositiveInt, Tag, model_validator

from moe.config.base import Config
from tuning.measure_names import MeasureName

Tree = dict[str, Any]

# Arms name folders of runs.
_ARM_NAME = re.compile(r"[^/.-][^/]*")


class Duration(Config):
    """The time that another arm's training took, in this arm's own steps."""

    arm: str
    """The arm whose time it is: its steps times the median of what they took."""
    paced_by: str
    """An arm whose steps take as long as this one's, so that what fits into the time is known before the first of
    them. Usually this arm at the other's number of steps."""


class Arm(Config):
    """One treatment."""

    says: str = Field(min_length=1)
    """What it is, in a few words for tables."""
    base: list[str] = Field(default=[])
    """Presets on top of the study's config."""
    config: Tree = Field(default={})
    """Keys of the run's config, on top of those; a changed ``kind`` takes nothing over from the one it replaces."""
    clip_rate_of: str | None = None
    """Another arm. This one clips the global norm at a limit that would have clipped as many of that arm's steps, of
    the same seed and point: the control that tells a clever clip from a tighter one."""
    as_long_as: Duration | None = None
    """This one takes as many optimizer steps as fit into the time of another arm's training, of the same seed and
    point: a comparison at equal wall time, with the whole schedule on either side."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Arms whose results this one's config is made of."""
        if self.as_long_as is not None:
            return (self.as_long_as.arm, self.as_long_as.paced_by)
        return (self.clip_rate_of,) if self.clip_rate_of is not None else ()

    @model_validator(mode="after")
    def _is_tuned_once(self) -> Self:
        if self.clip_rate_of is not None and self.as_long_as is not None:
            raise ValueError("as_long_as: does not go with clip_rate_of; leave one of them out")
        return self


class Grid(Config):
    """A key of the config that every arm is run at several values of."""

    key: str
    values: list[PositiveFloat] = Field(min_length=2)

    @model_validator(mode="after")
    def _values_rise(self) -> Self:
        if any(low >= high for low, high in zip(self.values, self.values[1:], strict=False)):
            raise ValueError(f"values should rise from one to the next, and are {self.values}")
        if len({f"{value:g}" for value in self.values}) < len(self.values):
            raise ValueError(f"values should differ within 6 digits, for they name the trials, and are {self.values}")
        return self


class AtPoint(Config):
    """The measure at one value of the grid."""

    kind: Literal["at"] = "at"
    value: PositiveFloat


class AtHighest(Config):
    """The mean over the highest values of the grid."""

    kind: Literal["highest"] = "highest"
    points: PositiveInt


class AtBest(Config):
    """The measure at the arm's best value of the grid: where its validation loss, averaged over seeds, is least."""

    kind: Literal["best"] = "best"


class Mean(Config):
    """The mean over the grid."""

    kind: Literal["mean"] = "mean"


class Sensitivity(Config):
    """The mean over the grid of what the measure lies above its least value there: the LR sensitivity of arXiv
    2309.14322, section 2.2, where the measure is the validation loss and the grid is the learning rate."""

    kind: Literal["sensitivity"] = "sensitivity"


class LargestStable(Config):
    """The largest value of the grid up to which no run diverged, 0 if the first did; the measure is ``diverged``."""

    kind: Literal["largest_stable"] = "largest_stable"


Reduction = Annotated[
    AtPoint | AtHighest | AtBest | Mean | Sensitivity | LargestStable,
    Field(discriminator="kind"),
]


class Quantity(Config):
    """One number per seed: a measure of an arm, over the grid if there is one."""

    arm: str
    measure: MeasureName
    over: Reduction | None = None
    """How the points of the grid become one number; needed if the study has a grid."""

    def possible_points(self, grid: Grid | None) -> Sequence[float | None]:
        """The values of the grid that it may be made of: with ``best``, all that the best one is chosen from."""
        if grid is None:
            return [None]
        match self.over:
            case AtPoint(value=value):
                return [value]
            case AtHighest(points=points):
                return grid.values[-points:]
            case _:
                return grid.values


def _quantity_or_number(value: Any) -> str | None:
    if isinstance(value, dict | Quantity):
        return "Quantity"
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return "number" if is_number else None


# Told apart beforehand, or a mistake in a quantity would be reported for the number as well.
QuantityOrNumber = Annotated[
    Annotated[Quantity, Tag("Quantity")] | Annotated[float, Tag("number")],
    Discriminator(
        _quantity_or_number,
        custom_error_type="quantity_or_number",
        custom_error_message="Input should be a quantity (a mapping with arm and measure) or a finite number",
    ),
]


class Condition(Config):
    """A comparison, seed by seed: ``left`` against ``factor * right + margin``."""

    left: Quantity
    relation: Literal["below", "above", "at_most", "within"]
    """``below``: left is less, beyond the noise of the seeds; ``above``: it is more. ``at_most``: it is less, but no
    difference at all (a spread of zero) will do. ``within``: they differ by at most ``tolerance`` of right, beyond the
    noise."""
    right: QuantityOrNumber
    factor: PositiveFloat = 1.0
    tolerance: PositiveFloat | None = None

    @model_validator(mode="after")
    def _tolerance_goes_with_within(self) -> Self:
        if (self.relation == "within") != (self.tolerance is not None):
            raise ValueError("tolerance goes with relation: within, and only with that")
        return self


class Exercised(Config):
    """The mechanism acted: a quantity that must be above a number on the mean over seeds."""

    quantity: Quantity
    above: float = 0.0


class Claim(Config):
    """What is said to come out."""

    name: str = Field(min_length=1)
    says: str = Field(min_length=1)
    """The claim in a sentence."""
    conditions: list[Condition] = Field(min_length=1)
    """It holds if all of them hold."""
    exercised: list[Exercised] = Field(default=[])
    """Without these nothing can be concluded, whatever came out."""


class StudyConfig(Config):
    """One study."""

    title: str = Field(min_length=1)
    question: str = Field(min_length=1)
    """What it is to answer, in a sentence or two."""
    notes: str = ""
    """What a reader must know of how it was set up, and where that differs from the claim's source."""
    base: list[str] = Field(min_length=1)
    """Presets of runs that all arms stand on."""
    config: Tree = Field(default={})
    """Keys of the run's config, on top of those."""
    settings: list[str] = Field(default=[])
    """``key=value`` each, on top of those: what the command's ``--set`` gave."""
    grid: Grid | None = None
    arms: dict[str, Arm] = Field(min_length=2)
    first_seed: NonNegativeInt = 0
    """Of the first block; the next ones count on."""
    reference: str | None = None
    """The arm whose losses say how hard each validation token is, for ``token_complexity``: those of another seed, so
    that a model is not asked of itself."""
    blocks: PositiveInt = 10
    """At most so many."""
    budget_minutes: PositiveFloat = 60.0
    """No block is begun that would not end within so many minutes; the first one always is."""
    shown: list[MeasureName] = Field(min_length=1)
    """Measures of the table and the picture, the most telling first."""
    claims: list[Claim] = Field(min_length=1)

    def points(self) -> list[float | None]:
        """Values of the grid; a single None without one."""
        return list(self.grid.values) if self.grid else [None]

    def quantities(self) -> Iterator[tuple[str, Quantity]]:
        """Every quantity that a claim names, with the path of its key."""
        for number, claim in enumerate(self.claims):
            for index, condition in enumerate(claim.conditions):
                yield f"claims.{number}.conditions.{index}.left", condition.left
                if isinstance(condition.right, Quantity):
                    yield f"claims.{number}.conditions.{index}.right", condition.right
            for index, exercised in enumerate(claim.exercised):
                yield f"claims.{number}.exercised.{index}.quantity", exercised.quantity

    @model_validator(mode="after")
    def _arms_can_be_run(self) -> Self:
        for name, arm in self.arms.items():
            if not _ARM_NAME.fullmatch(name):
                raise ValueError(
                    f"arms.{name}: a name should have no / and begin with neither . nor -, for it names folders"
                )
            key = "clip_rate_of" if arm.clip_rate_of is not None else "as_long_as"
            for other in arm.needs:
                if other not in self.arms or self.arms[other].needs:
                    raise ValueError(f"arms.{name}.{key}: should be an arm that is not tuned itself, not {other!r}")
        return self

    @model_validator(mode="after")
    def _claims_have_names_of_their_own(self) -> Self:
        names = [claim.name for claim in self.claims]
        for number, name in enumerate(names):
            if name in names[:number]:
                raise ValueError(f"claims.{number}.name: {name!r} is the name of another claim")
        return self

    @model_validator(mode="after")
    def _reference_is_there(self) -> Self:
        if self.reference is not None and self.reference not in self.arms:
            raise ValueError(f"reference: {self.reference!r} is none of the arms {', '.join(self.arms)}")
        if self.reference is not None and self.grid is not None:
            raise ValueError("reference: does not go with a grid; leave one of them out")
        return self

    @model_validator(mode="after")
    def _quantities_are_there(self) -> Self:
        for path, quantity in self.quantities():
            if quantity.arm not in self.arms:
                raise ValueError(f"{path}.arm: {quantity.arm!r} is none of the arms {', '.join(self.arms)}")
            if quantity.over is None and self.grid is not None:
                raise ValueError(f"{path}.over: is required with a grid, for example {{kind: mean}}")
            if quantity.over is not None and self.grid is None:
                raise ValueError(f"{path}.over: has no effect without a grid; leave it out")
            over = quantity.over
            if self.grid and isinstance(over, AtPoint) and over.value not in self.grid.values:
                raise ValueError(f"{path}.over.value: {over.value} is none of the grid's values {self.grid.values}")
            if self.grid and isinstance(over, AtHighest) and over.points > len(self.grid.values):
                raise ValueError(f"{path}.over.points: {over.points} is more than the {len(self.grid.values)} values")
            if isinstance(over, LargestStable) and quantity.measure != "diverged":
                raise ValueError(f"{path}.measure: should be diverged with over: {{kind: largest_stable}}")
        return self
