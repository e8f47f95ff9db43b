import math
import statistics

import numpy as np
import pytest
from scipy.stats import ttest_ind

from tuning.statistics import Interval, interval, pooled_interval

# Two-sided 95 % points of Student's t, from a printed table, by degrees of freedom.
T_TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 29: 2.045}


@pytest.mark.parametrize("freedom", T_TABLE)
def test_it_is_the_interval_of_students_t(freedom: int) -> None:
    values = np.random.default_rng(freedom).normal(3.0, 0.5, freedom + 1).tolist()
    reach = T_TABLE[freedom] * statistics.stdev(values) / math.sqrt(len(values))
    got = interval(values)
    assert got.n == freedom + 1
    assert got.mean == pytest.approx(statistics.mean(values))
    assert got.low == pytest.approx(statistics.mean(values) - reach, rel=1e-3)
    assert got.high == pytest.approx(statistics.mean(values) + reach, rel=1e-3)


def test_it_holds_the_true_mean_19_times_in_20() -> None:
    generator = np.random.default_rng(1)
    found = [interval(generator.normal(2.0, 1.0, 5).tolist()) for _ in range(2000)]
    assert np.mean([got.low <= 2.0 <= got.high for got in found]) == pytest.approx(0.95, abs=0.015)


def test_one_value_says_nothing_of_the_spread() -> None:
    assert interval([0.5]) == Interval(0.5, -math.inf, math.inf, 1)


@pytest.mark.parametrize("value", [0.0, 0.1, -1 / 3])
@pytest.mark.parametrize("n", [2, 3, 7])
def test_values_that_are_all_the_same_are_a_point(value: float, n: int) -> None:
    assert interval([value] * n) == Interval(value, value, value, n)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf, 1.0]])
def test_what_has_no_mean_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        interval(values)


def test_a_difference_is_that_of_students_two_samples() -> None:
    left, right = [1.0, 2.0, 4.0, 3.5], [5.0, 9.0, 7.5]
    found = pooled_interval(left, right, 0.9)
    expected = ttest_ind(right, left).confidence_interval(0.9)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.mean == pytest.approx(21.5 / 3 - 10.5 / 4)
    assert found.n == 7


def test_a_difference_of_two_values_is_open() -> None:
    assert pooled_interval([1.0], [2.5]) == Interval(1.5, -math.inf, math.inf, 2)
    # One on a side has the other's spread: t of 1 degree of freedom, and a variance of 0.5 x (1 + 1 / 2).
    found = pooled_interval([1.0], [2.0, 3.0])
    assert found.high - found.mean == pytest.approx(12.706 * math.sqrt(0.5 * 1.5), rel=1e-3)
    assert pooled_interval([1.0, 1.0], [2.0, 2.0]) == Interval(1.0, 1.0, 1.0, 4)
    with pytest.raises(ValueError, match="both sides"):
        pooled_interval([], [1.0])


def test_a_wider_confidence_is_a_wider_interval() -> None:
    # Student's t of 2 degrees of freedom at 99 %: 9.925, from a printed table.
    values = [1.0, 2.0, 4.0]
    found = interval(values, 0.99)
    assert found.high - found.mean == pytest.approx(9.925 * statistics.stdev(values) / math.sqrt(3), rel=1e-3)
