"""A mean over seeds, and how far it can be trusted."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95
"""Of intervals, unless something else is said."""


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval, of 95 % unless something else is said."""

    mean: float
    low: float
    high: float
    n: int
    """Values that it is the mean of."""


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Mean of independent values with the interval of Student's t: ``mean ± t(n - 1) * s / sqrt(n)``.

    One value has an infinite interval; values that are all the same have a point.

    Raises:
        ValueError: There is no value, or one is not finite.
    """
    n = len(values)
    if not n or not all(math.isfinite(value) for value in values):
        raise ValueError(f"an interval needs values that are all finite, not {list(values)}")
    mean = float(np.mean(values))
    if n == 1:
        return Interval(mean, -math.inf, math.inf, n)
    # Not by the spread, which rounding keeps above zero.
    if min(values) == max(values):
        return Interval(values[0], values[0], values[0], n)
    reach = float(stdtrit(n - 1, (1 + confidence) / 2) * np.std(values, ddof=1) / math.sqrt(n))
    return Interval(mean, mean - reach, mean + reach, n)


def pooled_interval(left: Sequence[float], right: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Interval of ``mean(right) - mean(left)`` of independent values of one spread (Student's t of two samples).

    Two or three values on a side, which a search at random has at every edge of its space, say nothing of a spread of
    their own. With a single value on both sides it is infinite; ``n`` is the number of all values.

    Raises:
        ValueError: There is no value on a side.
    """
    if not left or not right:
        raise ValueError("a difference needs values on both sides")
    n = len(left) + len(right)
    difference = float(np.mean(right) - np.mean(left))
    if n == 2:
        return Interval(difference, -math.inf, math.inf, n)
    squares = sum(float(np.var(side)) * len(side) for side in (left, right))
    error = math.sqrt(squares / (n - 2) * (1 / len(left) + 1 / len(right)))
    reach = float(stdtrit(n - 2, (1 + confidence) / 2)) * error
    return Interval(difference, difference - reach, difference + reach, n)
