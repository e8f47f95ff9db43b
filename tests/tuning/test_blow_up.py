"""When a finite loss says that a trial has diverged."""

import math

import pytest

from tuning.blow_up import BlowUp


def ended_at(losses: list[float], first: float | None = None) -> int | None:
    """The step, from 1, at which the trial is ended."""
    watch = BlowUp(first)
    return next((step for step, loss in enumerate(losses, start=1) if watch.see(loss) is not None), None)


def test_a_spike_that_comes_back_is_none() -> None:
    # Seven steps high is the most that comes back, and it may do so again and again.
    assert ended_at([4.0, *([9.0] * 7 + [3.0]) * 5]) is None


def test_a_loss_that_has_risen_ends_the_trial_at_its_eighth_step() -> None:
    assert ended_at([4.0, 3.0, *[5.0] * 20]) == 2 + 8
    watch = BlowUp()
    said = [watch.see(loss) for loss in (4.0, *[6.5] * 8)]
    assert said == [None] * 8 + ["the loss was 1.25 times the first (4.00) or more for 8 steps, now 6.5"]


def test_a_quarter_above_the_first_is_the_limit() -> None:
    assert ended_at([4.0, *[5.0] * 8]) == 9
    assert ended_at([4.0, *[4.99] * 100]) is None


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_what_is_not_finite_is_neither_the_first_loss_nor_above_it(lost: float) -> None:
    assert ended_at([lost, 4.0, *[5.0, lost] * 7, 3.0]) is None
    assert ended_at([lost, 4.0, *[5.0, lost] * 8]) == 2 + 15
    assert ended_at([lost] * 50) is None


def test_a_trial_that_goes_on_is_held_against_its_first_step() -> None:
    assert ended_at([2.0, *[3.0] * 20]) == 9
    assert ended_at([2.0, *[3.0] * 20], first=5.5) is None
    assert ended_at([2.0, *[7.0] * 20], first=5.5) == 9
