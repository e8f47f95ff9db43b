"""Points of a search space: all of a grid's, random ones, and what a point is called. Imports no torch."""

import itertools
import math
import random
from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.loading import nested
from tuning.space_config import (
    ChoiceDimension,
    Dimension,
    GridDimension,
    IntDimension,
    LogUniformDimension,
    UniformDimension,
    Values,
    in_order,
    is_active,
)

_DIGITS = 4
Space = Mapping[str, Dimension]


def grid_points(space: Space) -> list[Values]:
    """Every combination of the values, those of conditional keys only where they are active."""
    points: list[Values] = [{}]
    for key in in_order(space):
        dimension = space[key]
        assert isinstance(dimension, ChoiceDimension | GridDimension), "check_space comes first"
        points = [
            extended
            for values in points
            for extended in (
                [{**values, key: value} for value in dimension.values] if is_active(dimension, values) else [values]
            )
        ]
    return points


def shuffled_grid(space: Space, seed: int) -> list[Values]:
    """`grid_points` in a random order, the same for the same seed."""
    points = grid_points(space)
    random.Random(f"grid {seed}").shuffle(points)
    return points


def random_point(space: Space, seed: int, number: int) -> Values:
    """Draw ``number`` of the sequence that ``seed`` names, whatever was drawn before."""
    source = random.Random(f"point {seed} {number}")
    values: Values = {}
    for key in in_order(space):
        if is_active(space[key], values):
            values[key] = _draw(space[key], source)
    return values


def corner_points(space: Space) -> Iterator[Values]:
    """Points that have every end of every interval and every value of every list, each at least once."""
    active = grid_points({key: d for key, d in space.items() if isinstance(d, ChoiceDimension | GridDimension)})
    intervals = {key: d for key, d in space.items() if not isinstance(d, ChoiceDimension | GridDimension)}
    for values, high in itertools.product(active, (False, True)):
        ends = {key: (d.high if high else d.low) for key, d in intervals.items() if is_active(d, values)}
        yield {**values, **ends}


def _draw(dimension: Dimension, source: random.Random) -> Any:
    match dimension:
        case ChoiceDimension(values=values) | GridDimension(values=values):
            return source.choice(values)
        case UniformDimension(low=low, high=high):
            return rounded(source.uniform(low, high), low, high)
        case LogUniformDimension(low=low, high=high):
            return rounded(math.exp(source.uniform(math.log(low), math.log(high))), low, high)
        case IntDimension(low=low, high=high, log=log):
            if not log:
                return source.randint(low, high)
            drawn = math.exp(source.uniform(math.log(low), math.log(high + 1)))
            return min(max(int(drawn), low), high)


def neighbour(space: Space, values: Values, source: random.Random, resample_probability: float) -> Values:
    """A point near another, as population based training explores (arXiv 1711.09846, section 4.1.1): a number is
    multiplied by 0.8 or 1.2 within its bounds, a value of a list moves by a place; or each is drawn anew."""
    near: Values = {}
    for key in in_order(space):
        dimension = space[key]
        if source.random() < resample_probability:
            near[key] = _draw(dimension, source)
        elif isinstance(dimension, ChoiceDimension | GridDimension):
            place = dimension.values.index(values[key]) + source.choice((-1, 1))
            near[key] = dimension.values[min(max(place, 0), len(dimension.values) - 1)]
        elif isinstance(dimension, IntDimension):
            factor = source.choice((0.8, 1.2))
            # At least by 1: rounding would leave a small one where it is for ever.
            by = max(1, abs(round(values[key] * (factor - 1))))
            near[key] = min(max(values[key] + (by if factor > 1 else -by), dimension.low), dimension.high)
        else:
            near[key] = rounded(values[key] * source.choice((0.8, 1.2)), dimension.low, dimension.high)
    return near


def rounded(value: float, low: float, high: float) -> float:
    """To 4 digits: more would only be longer to read and to type again."""
    return min(max(float(f"{value:.{_DIGITS}g}"), low), high)


def as_tree(values: Values) -> dict[str, Any]:
    """The layer of a run's config that sets the values."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        _merge(tree, nested(tuple(key.split(".")), value))
    return tree


def _merge(below: dict[str, Any], above: dict[str, Any]) -> None:
    for key, value in above.items():
        old = below.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            _merge(old, value)
        else:
            below[key] = value


def short_names(keys: list[str]) -> dict[str, str]:
    """The last part of each key, or more of it where that is no name of its own; ``clip`` for ``clip.kind``."""
    names = {}
    for key in keys:
        parts = key.removesuffix(".kind").split(".")
        ends = {other: other.removesuffix(".kind").split(".") for other in keys if other != key}
        length = next(
            (n for n in range(1, len(parts)) if all(end[-n:] != parts[-n:] for end in ends.values())), len(parts)
        )
        names[key] = ".".join(parts[-length:])
    return names


def label(values: Values, names: Mapping[str, str]) -> str:
    """A point in few words: ``lr=0.003 clip=global max_norm=1``."""
    return " ".join(f"{names[key]}={_word(value)}" for key, value in values.items())


def _word(value: Any) -> str:
    if isinstance(value, dict):
        rest = ",".join(f"{key}={_word(inner)}" for key, inner in value.items() if key != "kind")
        kind = value.get("kind", "")
        return f"{kind}({rest})" if rest else str(kind)
    return f"{value:g}" if isinstance(value, float) else str(value)
