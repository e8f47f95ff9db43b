"""A mean over seeds, and how far it can be trusted."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval."""

    mean: float
    low: float
    high: float
    n: int
    """Values that it is the mean of."""


def interval(values: Sequence[float]) -> Interval:
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
    reach = float(stdtrit(n - 1, (1 + _CONFIDENCE) / 2) * np.std(values, ddof=1) / math.sqrt(n))
    return Interval(mean, mean - reach, mean + reach, n)
