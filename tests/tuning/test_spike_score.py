import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuning.spike_score import first_scored_step, spike_score

STEPS = 300
# The window has 50 residuals after the first value, which has nothing before it.
SCORED = STEPS - 51


def noise(seed: int = 0, steps: int = STEPS) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.05, steps)


def descent(steps: int = STEPS) -> np.ndarray:
    """A loss from 5.5 to 2, steep at first."""
    return 2 + 3.5 * np.exp(-np.arange(steps) / 30)


def percent(spikes: int, scored: int = SCORED) -> float:
    return 100 * spikes / scored


def score(values: np.ndarray, warmup: int = 0, excluded: frozenset[int] = frozenset()) -> float | None:
    return spike_score(values.tolist(), STEPS, warmup, excluded)


def with_spikes(values: np.ndarray, *steps: int, height: float = 3.0) -> np.ndarray:
    spiky = values.copy()
    for step in steps:
        spiky[step - 1] += height
    return spiky


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("course", [descent, lambda: np.full(STEPS, 3.0)])
def test_a_run_without_spikes_has_none(course: Callable[[], np.ndarray], seed: int) -> None:
    assert score(course() + noise(seed)) == 0


def test_every_planted_spike_counts_once() -> None:
    assert score(with_spikes(descent() + noise(), 80, 81, 150, 290)) == percent(4)


def test_a_spike_during_the_descent_is_seen_that_the_plain_rolling_deviation_hides() -> None:
    values = with_spikes(descent() + noise(), 90, height=1.5)
    before = values[:89]
    assert values[89] - before.mean() < 7 * before.std()
    assert score(values) == percent(1)


def test_one_spike_does_not_hide_the_next() -> None:
    values = with_spikes(np.full(STEPS, 2.0) + noise(), 100, height=50.0)
    assert score(with_spikes(values, 140, height=1.0)) == percent(2)


def test_a_fall_is_no_spike_and_does_not_hide_the_next_one() -> None:
    values = np.full(STEPS, 4.0) + noise()
    values[199:] -= 2.0
    assert score(values) == 0
    assert score(with_spikes(values, 240, height=1.0)) == percent(1)


def test_a_jump_that_stays_counts_until_it_is_half_of_the_last_nine() -> None:
    values = np.full(STEPS, 2.0) + noise()
    values[199:] += 3.0
    assert score(values) == percent(5)


def test_seven_standard_deviations_are_the_bound() -> None:
    # Worked out from the definition, and approached from both sides.
    values = np.tile([1.0, -1.0], STEPS // 2)
    residuals = [values[t] - np.median(values[max(0, t - 9) : t]) for t in range(1, 200)]
    level = np.median(values[191:200])
    bound = level + np.mean(residuals) + 7 * np.std(residuals)
    for offset, spikes in ((-1e-3, 0), (1e-3, 1)):
        moved = values.copy()
        moved[200] = bound + offset
        assert score(moved[:201]) == percent(spikes, scored=201 - 51)


def test_what_is_not_finite_is_a_spike() -> None:
    values = with_spikes(descent() + noise(), 150)
    values[199] = math.nan
    values[219] = math.inf
    assert score(values) == percent(3)


def test_a_run_that_is_lost_before_there_is_anything_to_score_is_all_spike() -> None:
    assert spike_score([5.5, 5.4, math.nan], STEPS, 10) == 100


def test_excluded_steps_have_no_part_in_it_and_what_follows_counts() -> None:
    clean = descent() + noise()
    values = with_spikes(clean, 150, 151, 152)
    assert score(values, excluded=frozenset({150, 152})) == percent(1, scored=SCORED - 2)
    broken = clean.copy()
    broken[149] = math.nan
    assert score(broken, excluded=frozenset({150})) == percent(0, scored=SCORED - 1)


@pytest.mark.parametrize("height", [-1e6, 0.0, 1e6])
def test_the_value_of_an_excluded_step_changes_nothing(height: float) -> None:
    values = with_spikes(descent() + noise(), 148, 151, 170)
    excluded = frozenset(range(100, 150, 2))
    moved = with_spikes(values, *excluded, height=height)
    assert score(moved, excluded=excluded) == score(values, excluded=excluded) == percent(2, scored=SCORED - 25)


def test_the_warm_up_is_neither_scored_nor_looked_at() -> None:
    calm = np.full(STEPS, 2.0) + noise()
    wild = with_spikes(calm, 5, 30, 70, 95, height=60.0)
    spiky = with_spikes(wild, 200, height=1.0)
    # Values of the warm-up are what the first residual is taken against, so that is there at once.
    assert score(spiky, warmup=100) == percent(1, scored=STEPS - 100 - 50)
    assert score(wild, warmup=100) == 0


def test_too_short_a_run_has_no_score() -> None:
    assert score(descent()[:51]) is None
    assert score(descent()[:52]) == 0
    assert spike_score([], STEPS) is None


def test_rounding_is_no_spike() -> None:
    falling = np.linspace(5.0, 2.0, STEPS)
    assert score(np.full(STEPS, 0.1)) == 0
    assert score(falling) == 0
    assert score(np.array([0.1] * 200 + [0.1000001] * 100)) == 0
    assert score(np.array([0.1] * 200 + [0.10001] * 100)) == percent(5)
    assert spike_score([float(f"{value:.6g}") for value in falling], STEPS) == 0


@pytest.mark.parametrize(("steps", "window"), [(4999, 200), (5000, 1000)])
def test_a_run_of_5000_steps_has_the_window_of_the_paper(steps: int, window: int) -> None:
    # Wide noise ends 300 steps before the bump: the long window still holds it, the short one does not.
    values = np.concatenate((20 * noise(0, 700), noise(1, 300))) + 3.0
    bump = [*values.tolist(), values[-1] + 1.5]
    assert spike_score(bump, steps) == (percent(1, scored=1001 - 51) if window == 200 else 0)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 1000),
    spikes=st.sets(st.integers(60, STEPS), max_size=4),
    scale=st.floats(1e-3, 1e3),
)
def test_the_unit_of_the_values_does_not_matter(seed: int, spikes: set[int], scale: float) -> None:
    values = with_spikes(descent() + noise(seed), *spikes)
    assert score(values) == score(scale * values) == percent(len(spikes))


@pytest.mark.parametrize("warmup", [0, 1, 2, 30])
def test_the_first_step_that_is_scored(warmup: int) -> None:
    values = noise().tolist()
    lengths = [steps for steps in range(1, warmup + 60) if spike_score(values[:steps], steps, warmup) is not None]
    assert first_scored_step(warmup) == min(lengths)
