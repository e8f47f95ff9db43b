"""The dimensions of a search space, as a sweep's file has them. Imports no torch."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from moe.config.base import Config

Values = dict[str, Any]
"""A point of the space: what each key that is active there is set to, by its dotted name."""


class _Dimension(Config):
    when: dict[str, list[Any]] = Field(default={})
    """Other keys of the space and the values of theirs with which this key is set; otherwise it is left alone."""


class ChoiceDimension(_Dimension):
    """One of a list; each may be whatever the key takes, a whole section too."""

    kind: Literal["choice"] = "choice"
    values: list[Any] = Field(min_length=2)

    @model_validator(mode="after")
    def _values_differ(self) -> Self:
        _refuse_repeated(self.values)
        return self


class GridDimension(_Dimension):
    """Numbers that are all to be tried: for searcher ``grid``."""

    kind: Literal["grid"] = "grid"
    # A number may be of either kind, which for pydantic is a choice, and two complaints about each that is neither.
    values: list[Any] = Field(min_length=2)

    @model_validator(mode="after")
    def _values_differ(self) -> Self:
        for value in self.values:
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"values: should be finite numbers, and {value!r} is none; kind choice takes anything")
        _refuse_repeated(self.values)
        return self


class UniformDimension(_Dimension):
    """Any number of an interval, each as likely as the other."""

    kind: Literal["uniform"] = "uniform"
    low: float
    high: float

    @model_validator(mode="after")
    def _rises(self) -> Self:
        _refuse_empty(self.low, self.high)
        return self


class LogUniformDimension(_Dimension):
    """Any number of an interval, each order of magnitude as likely as the other."""

    kind: Literal["log_uniform"] = "log_uniform"
    low: PositiveFloat
    high: PositiveFloat

    @model_validator(mode="after")
    def _rises(self) -> Self:
        _refuse_empty(self.low, self.high)
        return self


class IntDimension(_Dimension):
    """Any integer from ``low`` to ``high``, both included."""

    kind: Literal["int"] = "int"
    low: int
    high: int
    log: bool = False
    """Whether each order of magnitude is as likely as the other."""

    @model_validator(mode="after")
    def _rises(self) -> Self:
        _refuse_empty(self.low, self.high)
        if self.log and self.low < 1:
            raise ValueError(f"low: should be at least 1 with log, not {self.low}")
        return self


Dimension = Annotated[
    ChoiceDimension | GridDimension | UniformDimension | LogUniformDimension | IntDimension,
    Field(discriminator="kind"),
]


def in_order(space: Mapping[str, _Dimension]) -> list[str]:
    """The keys, each after those that its condition names; otherwise as they are listed.

    Raises:
        ValueError: a condition names no key of the space, or itself by a detour.
    """
    ordered: list[str] = []
    waiting = list(space)
    while waiting:
        ready = [key for key in waiting if all(other in ordered for other in space[key].when)]
        if not ready:
            key = waiting[0]
            others = [other for other in space[key].when if other not in space]
            if others:
                raise ValueError(f"space.{key}.when: {others[0]!r} is no key of the space: {', '.join(space)}")
            raise ValueError(f"space.{key}.when: the conditions of {', '.join(waiting)} wait for each other")
        ordered += ready
        waiting = [key for key in waiting if key not in ordered]
    return ordered


def is_active(dimension: _Dimension, values: Mapping[str, Any]) -> bool:
    """Whether the key is set where ``values`` holds: a key that is not active itself fulfils no condition."""
    return all(key in values and values[key] in wanted for key, wanted in dimension.when.items())


def check_space(space: Mapping[str, _Dimension], *, grid: bool) -> None:
    """ValueError if the space does not hold together, or does not suit the searcher (``grid`` or another)."""
    in_order(space)
    for key, dimension in space.items():
        _check_key(key, space)
        for other, wanted in dimension.when.items():
            above = space[other]
            if not isinstance(above, ChoiceDimension | GridDimension):
                raise ValueError(f"space.{key}.when.{other}: should name a key of kind choice or grid")
            if not wanted:
                raise ValueError(f"space.{key}.when.{other}: should list values with which {key} is set, and is empty")
            if impossible := [value for value in wanted if value not in above.values]:
                raise ValueError(f"space.{key}.when.{other}: {impossible[0]!r} is none of {above.values}")
        is_list = isinstance(dimension, ChoiceDimension | GridDimension)
        if grid and not is_list:
            raise ValueError(f"space.{key}.kind: should be grid or choice with searcher.kind=grid, the default")
        if not grid and isinstance(dimension, GridDimension):
            raise ValueError(f"space.{key}.kind: grid goes with searcher.kind=grid; use choice")


# What must be the same in all trials, or they could not be compared or would not fit into one slot.
_FIXED = {
    "seed": "use seeds, or config.seed for the first of them",
    "parallel": "one sweep has one number of workers; set it in config",
    "tracking": "it changes nothing that is measured",
    "validation": "losses would be of other text",
    "checkpoint": "it changes nothing that is measured",
    "recovery": "it changes nothing that is measured",
    "schedule.steps": "losses would be of other amounts of text; set it in config",
}
_FREE_DATA = "data.global_batch_size"


def _check_key(key: str, space: Mapping[str, _Dimension]) -> None:
    if not all(key.split(".")):
        raise ValueError(f"space.{key}: should be a dotted key of a run's config, such as optimizer.lr")
    for fixed, why in _FIXED.items():
        if key == fixed or key.startswith(f"{fixed}."):
            raise ValueError(f"space.{key}: cannot be swept: {why}")
    if key.startswith("data") and key != _FREE_DATA:
        raise ValueError(f"space.{key}: cannot be swept, for losses would be of other text; {_FREE_DATA} can")
    inside = [other for other in space if other.startswith(f"{key}.")]
    if inside and any(isinstance(v, dict) for v in getattr(space[key], "values", ())):
        raise ValueError(f"space.{inside[0]}: is inside {key}, whose values are whole sections; leave one of them out")


def _refuse_repeated(values: Sequence[Any]) -> None:
    for number, value in enumerate(values):
        if value in values[:number]:
            raise ValueError(f"values: {value!r} is there twice")


def _refuse_empty(low: float, high: float) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"low should be below high, and they are {low:g} and {high:g}")
