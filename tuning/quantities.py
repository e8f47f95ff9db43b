"""What a claim compares, as one number per seed: a measure of an arm, over the points of the grid if there is one."""

from collections.abc import Sequence
from statistics import fmean

from tuning.results import Results, TrialKey
from tuning.study_config import AtBest, Grid, LargestStable, Quantity, Sensitivity


class Unmeasured(Exception):  # noqa: N818 - nobody's mistake, but what came out
    """A run diverged before what a claim compares was measured; the message says which run and what."""


def by_seed(quantity: Quantity, results: Results, grid: Grid | None) -> list[float]:
    """The quantity of each seed of ``results.seeds``.

    Raises:
        Unmeasured: A run that diverged does not have the measure.
        ValueError: A run that did not diverge does not have it.
    """
    points = _points(quantity, results, grid)
    rows_SP = [
        [_value(results, quantity.measure, TrialKey(seed, quantity.arm, point)) for point in points]
        for seed in results.seeds
    ]
    match quantity.over:
        case Sensitivity():
            return [fmean(row_P) - min(row_P) for row_P in rows_SP]
        case LargestStable():
            return [_largest_stable(row_P, points) for row_P in rows_SP]
        case _:
            return [fmean(row_P) for row_P in rows_SP]


def best_point(arm: str, results: Results, points: Sequence[float]) -> float:
    """The value of the grid at which the arm's validation loss, averaged over seeds, is least; the lowest of equals."""

    def loss(point: float) -> float:
        return fmean(results.value("val_loss", seed, arm, point) for seed in results.seeds)

    return min(points, key=loss)


def _points(quantity: Quantity, results: Results, grid: Grid | None) -> Sequence[float | None]:
    """The points whose trials the quantity is made of: a run that it does not need may lack the measure."""
    if grid is not None and isinstance(quantity.over, AtBest):
        return [best_point(quantity.arm, results, grid.values)]
    return quantity.possible_points(grid)


def _largest_stable(diverged_P: Sequence[float], points: Sequence[float | None]) -> float:
    largest = 0.0
    for point, diverged in zip(points, diverged_P, strict=True):
        if diverged or point is None:
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
