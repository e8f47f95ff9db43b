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


def welch_interval(left: Sequence[float], right: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Interval of ``mean(right) - mean(left)`` of independent values of unequal spread (Welch, Biometrika 34, 1947).

    With a single value on a side it is infinite; ``n`` is the number of all values.

    Raises:
        ValueError: There is no value on a side.
    """
    if not left or not right:
        raise ValueError("a difference needs values on both sides")
    n = len(left) + len(right)
    difference = float(np.mean(right) - np.mean(left))
    if min(len(left), len(right)) == 1:
        return Interval(difference, -math.inf, math.inf, n)
    of_left, of_right = (float(np.var(side, ddof=1)) / len(side) for side in (left, right))
    variance = of_left + of_right
    if variance == 0:
        return Interval(difference, difference, difference, n)
    freedom = variance**2 / (of_left**2 / (len(left) - 1) + of_right**2 / (len(right) - 1))
    reach = float(stdtrit(freedom, (1 + confidence) / 2)) * math.sqrt(variance)
    return Interval(difference, difference - reach, difference + reach, n)
