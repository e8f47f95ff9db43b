"""What a claim compares, as one number per seed: a measure of an arm, over the points of the grid if there is one."""

import math
from collections.abc import Callable, Sequence
from typing import assert_never

import numpy as np

from tuning.results import Results, TrialKey
from tuning.study_config import (
    AtBest,
    AtHighest,
    AtPoint,
    Grid,
    LargestStable,
    Mean,
    Quantity,
    Reduction,
    Sensitivity,
)


class Unmeasured(Exception):  # noqa: N818 - nobody's mistake, but what came out
    """A run diverged before what a claim compares was measured; the message says which run and what."""


def by_seed(quantity: Quantity, results: Results, grid: Grid | None) -> list[float]:
    """The quantity of each seed of ``results.seeds``.

    Raises:
        Unmeasured: A run that diverged does not have the measure.
        ValueError: A run that did not diverge does not have it.
    """
    if quantity.over is None or grid is None:
        return [_value(results, quantity.measure, TrialKey(seed, quantity.arm)) for seed in results.seeds]
    points = grid.values
    table_SP = [
        [_value(results, quantity.measure, TrialKey(seed, quantity.arm, point)) for point in points]
        for seed in results.seeds
    ]
    reduce = _reduction(quantity.over, quantity.arm, results, points)
    return [float(reduce(row_P)) for row_P in table_SP]


def best_point(arm: str, results: Results, points: Sequence[float]) -> float:
    """The value of the grid at which the arm's validation loss, averaged over seeds, is least; the lowest of equals."""

    def loss(point: float) -> float:
        return float(np.mean([results.value("val_loss", seed, arm, point) for seed in results.seeds]))

    return min(points, key=loss)


def _reduction(
    over: Reduction, arm: str, results: Results, points: Sequence[float]
) -> Callable[[Sequence[float]], float]:
    """From values at every point of the grid to one."""
    match over:
        case AtPoint(value=value):
            index = points.index(value)
            return lambda row_P: row_P[index]
        case AtBest():
            best = points.index(best_point(arm, results, points))
            return lambda row_P: row_P[best]
        case AtHighest(points=count):
            return lambda row_P: math.fsum(row_P[-count:]) / count
        case Mean():
            return lambda row_P: math.fsum(row_P) / len(row_P)
        case Sensitivity():
            return lambda row_P: math.fsum(value - min(row_P) for value in row_P) / len(row_P)
        case LargestStable():
            return lambda row_P: _largest_stable(row_P, points)
        case other:
            assert_never(other)


def _largest_stable(diverged_P: Sequence[float], points: Sequence[float]) -> float:
    largest = 0.0
    for point, diverged in zip(points, diverged_P, strict=True):
        if diverged:
            break
        largest = point
    return largest


def _value(results: Results, measure: str, key: TrialKey) -> float:
    try:
        return results.value(measure, key.seed, key.arm, key.point)
    except KeyError:
        if results.value("diverged", key.seed, key.arm, key.point):
            raise Unmeasured(f"{key.name} diverged before {measure} was measured") from None
        raise ValueError(f"{measure} is not among the measures of {key.name}") from None
