"""The order of a study's trials, and which blocks the budget holds; time is a number that the test moves on."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuning.blocks import Blocks, blocks_of
from tuning.results import TrialKey
from tuning.study_config import StudyConfig

PLAIN: Mapping[str, str | None] = {"a": None, "b": None}
TUNED: Mapping[str, str | None] = {"like-b": "b", "a": None, "b": None}


class Clock:
    """Seconds."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def study(arms: Mapping[str, str | None] = PLAIN, points: Sequence[float] = (), **keys: Any) -> StudyConfig:
    """``arms``: each with the arm whose clip rate it is tuned to."""
    first = next(iter(arms))
    left = {"arm": first, "measure": "val_loss", **({"over": {"kind": "mean"}} if points else {})}
    tree: dict[str, Any] = {
        "title": "t",
        "question": "q",
        "base": ["micro"],
        "arms": {name: {"says": name, "clip_rate_of": other} for name, other in arms.items()},
        "shown": ["val_loss"],
        "claims": [{"name": "c", "says": "s", "conditions": [{"left": left, "relation": "below", "right": 9}]}],
        **({"grid": {"key": "optimizer.lr", "values": list(points)}} if points else {}),
    }
    return StudyConfig.model_validate(tree | keys)


def hand_out(blocks: Blocks) -> list[TrialKey]:
    """Every trial that is to be had before any other ends."""
    keys = []
    while isinstance(key := blocks.next(), TrialKey):
        keys.append(key)
    return keys


def run_one_by_one(blocks: Blocks, clock: Clock, seconds: float) -> list[TrialKey]:
    """All trials, none beside another, each as long as the others."""
    keys = []
    while isinstance(key := blocks.next(), TrialKey):
        keys.append(key)
        clock.now += seconds
        blocks.ended(key)
    assert key == "end"
    return keys


def test_a_block_is_one_seed_through_every_arm_and_point() -> None:
    config = study(points=[0.1, 0.2], blocks=2, first_seed=7)
    assert run_one_by_one(Blocks(config, 1, 1.0, clock=Clock()), Clock(), 0.0) == [
        TrialKey(seed, arm, point) for seed in (7, 8) for arm in ("a", "b") for point in (0.1, 0.2)
    ]
    assert [len(block) for block in blocks_of(config)] == [4, 4]


@pytest.mark.parametrize(("minutes", "blocks"), [(0.01, 1), (3.9, 1), (4.0, 2), (5.9, 2), (6.0, 3), (100.0, 5)])
def test_a_block_is_begun_if_it_ends_within_the_budget_at_the_pace_so_far(minutes: float, blocks: int) -> None:
    clock = Clock()
    # Two arms of a minute each; the estimate of an hour counts for nothing once a trial has ended.
    order = Blocks(study(blocks=5, budget_minutes=minutes), 1, 3600.0, clock=clock)
    assert len(run_one_by_one(order, clock, 60.0)) == 2 * blocks
    assert order.begun == blocks
    assert order.left == 0


@pytest.mark.parametrize(("minutes", "begins"), [(2.4, False), (2.5, True)])
def test_what_still_runs_is_counted_and_slots_share_the_work(minutes: float, begins: bool) -> None:
    clock = Clock()
    order = Blocks(study(budget_minutes=minutes), 2, 1.0, clock=clock)
    first, second = order.next(), order.next()
    assert isinstance(first, TrialKey)
    clock.now += 60.0
    order.ended(first)
    # A minute is gone; one trial runs, and two more would come: three at a minute each on two slots.
    assert isinstance(order.next(), TrialKey) == begins
    assert isinstance(second, TrialKey)
    assert order.left == (3 if begins else 1)


@pytest.mark.parametrize(("estimate", "trials"), [(74.0, 4), (76.0, 2)])
def test_before_a_trial_has_ended_the_estimate_counts(estimate: float, trials: int) -> None:
    # Four trials on four slots take one estimate; six would take one and a half.
    order = Blocks(study(budget_minutes=1.25), 4, estimate, clock=Clock())
    assert len(hand_out(order)) == trials


def test_what_is_left_follows_the_pace_of_the_trials_that_ended() -> None:
    clock = Clock()
    order = Blocks(study(blocks=1, points=[0.1, 0.2]), 2, 10.0, clock=clock)
    keys = [order.next(), order.next()]
    assert (order.left, order.seconds_left) == (4, 4 * 10.0 / 2)
    for key, seconds in zip(keys, (30.0, 20.0), strict=True):
        assert isinstance(key, TrialKey)
        clock.now += seconds
        order.ended(key)
    # They took 30 and 50 seconds.
    assert (order.left, order.seconds_left) == (2, 2 * 40.0 / 2)


def test_a_trial_lasts_from_when_it_runs_not_from_when_it_was_handed_out() -> None:
    clock = Clock()
    order = Blocks(study(blocks=1), 1, 1.0, clock=clock)
    key = order.next()
    assert isinstance(key, TrialKey)
    clock.now += 100.0
    order.started(key)
    clock.now += 5.0
    order.ended(key)
    assert order.seconds_left == 5.0


def test_a_tuned_arm_comes_last_and_waits_for_the_result_that_it_is_tuned_to() -> None:
    order = Blocks(study(TUNED, blocks=1), 3, 1.0, clock=Clock())
    assert hand_out(order) == [TrialKey(0, "a"), TrialKey(0, "b")]
    order.ended(TrialKey(0, "a"))
    assert order.next() == "wait"
    order.ended(TrialKey(0, "b"))
    assert order.next() == TrialKey(0, "like-b")
    assert order.next() == "end"


def test_a_tuned_trial_waits_for_its_own_point_only() -> None:
    order = Blocks(study(TUNED, points=[0.1, 0.2], blocks=1), 9, 1.0, clock=Clock())
    assert len(hand_out(order)) == 4
    order.ended(TrialKey(0, "b", 0.2))
    assert hand_out(order) == [TrialKey(0, "like-b", 0.2)]


def test_what_is_done_is_not_run_again() -> None:
    done = [TrialKey(0, "a"), TrialKey(0, "b"), TrialKey(1, "b")]
    clock = Clock()
    order = Blocks(study(TUNED, blocks=2), 1, 1.0, done, clock)
    assert run_one_by_one(order, clock, 1.0) == [TrialKey(0, "like-b"), TrialKey(1, "a"), TrialKey(1, "like-b")]


def test_the_first_block_that_is_not_whole_is_begun_whatever_the_budget() -> None:
    whole = [TrialKey(0, "a"), TrialKey(0, "b")]
    clock = Clock()
    order = Blocks(study(blocks=3, budget_minutes=0.1), 1, 3600.0, [*whole, TrialKey(1, "a")], clock)
    assert run_one_by_one(order, clock, 3600.0) == [TrialKey(1, "b")]


def test_a_study_of_which_all_is_done_has_no_trial() -> None:
    config = study(blocks=2)
    order = Blocks(config, 1, 1.0, [key for block in blocks_of(config) for key in block], Clock())
    assert order.next() == "end"
    assert (order.begun, order.left, order.seconds_left) == (2, 0, 0.0)


@settings(deadline=None)
@given(data=st.data())
def test_however_trials_end_each_is_run_once_and_blocks_are_whole_and_in_order(data: st.DataObject) -> None:
    arms = data.draw(st.sampled_from([PLAIN, TUNED, {"x": "a", **PLAIN, "y": "b"}]))
    points = data.draw(st.sampled_from([(), (0.1, 0.2)]))
    slots, blocks = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    minutes = data.draw(st.floats(0.1, 10.0))
    config = study(arms, points, blocks=blocks, budget_minutes=minutes)
    every = [key for block in blocks_of(config) for key in block]
    done = data.draw(st.sets(st.sampled_from(every)))
    clock = Clock()
    order = Blocks(config, slots, data.draw(st.floats(1.0, 100.0)), done, clock)
    running: list[TrialKey] = []
    handed_out: list[TrialKey] = []
    finished = set(done)
    while True:
        key = order.next() if len(running) < slots else "wait"
        if isinstance(key, TrialKey):
            needed = arms[key.arm]
            assert needed is None or TrialKey(key.seed, needed, key.point) in finished
            running.append(key)
            handed_out.append(key)
        elif running:
            clock.now += data.draw(st.floats(0.0, 100.0))
            ended = running.pop(data.draw(st.integers(0, len(running) - 1)))
            order.ended(ended)
            finished.add(ended)
        else:
            assert key == "end"  # nobody waits for what does not run
            break
    seeds = [key.seed for key in handed_out]
    assert seeds == sorted(seeds)
    begun = [key for key in every if key.seed < order.begun]
    assert sorted(handed_out, key=every.index) == [key for key in begun if key not in done]
    assert order.left == 0
