"""Which configuration comes next, and that a sweep which is begun again asks for the same ones."""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.tuning.sweep_file import SWEEP
from tuning.objective import Configuration
from tuning.space import grid_points, random_point
from tuning.space_config import Values
from tuning.suggest import Suggester, Verdict, make_suggester
from tuning.sweep_config import SweepConfig
from tuning.sweep_journal import Begun, Ended, TrialState

PLANE: dict[str, Any] = {
    "x": {"kind": "uniform", "low": -1.0, "high": 1.0},
    "y": {"kind": "log_uniform", "low": 1e-4, "high": 1.0},
}
CLIPS = [{"kind": "none"}, {"kind": "global", "max_norm": 1.0}, {"kind": "global", "max_norm": 0.1}]
SECTIONS: dict[str, Any] = {
    "clip": {"kind": "choice", "values": CLIPS},
    "x": {"kind": "uniform", "low": -1.0, "high": 1.0, "when": {"clip": CLIPS[1:]}},
    "n": {"kind": "int", "low": 1, "high": 64, "log": True},
}


def sweep(space: Any = PLANE, kind: str = "tpe", startup: int = 5, **more: Any) -> SweepConfig:
    searcher = {"kind": kind, **({"startup_trials": startup} if kind in ("tpe", "multi_objective") else {})}
    budget = {} if kind == "grid" else {"trials": 1000}
    return SweepConfig.model_validate({**SWEEP, "space": space, "searcher": searcher, "budget": budget, **more})


def quadratic(point: Values) -> float:
    """Least, 0, at x = 0.3 and y = 0.01."""
    return float((point["x"] - 0.3) ** 2 + (math.log10(point["y"]) + 2) ** 2)


def run(suggester: Suggester, judge: Callable[[Values], Verdict], count: int) -> list[Values]:
    points = []
    for number in range(count):
        values = suggester.suggest(number)
        assert values is not None
        suggester.tell(number, values, judge(values))
        points.append(values)
    return points


def plain(point: Values) -> Verdict:
    return Verdict((quadratic(point),), (0.0,))


def test_a_grid_hands_out_each_of_its_points_once_and_then_none() -> None:
    space = {"a": {"kind": "grid", "values": [1, 2, 3]}, "b": {"kind": "choice", "values": CLIPS}}
    config = sweep(space, "grid")
    suggester = make_suggester(config)
    points = [suggester.suggest(number) for number in range(10)]
    assert points[9] is None
    assert sorted(points[:9], key=str) == sorted(grid_points(config.space), key=str)
    assert make_suggester(config).suggest(4) == points[4]


def test_chance_learns_nothing() -> None:
    config = sweep(kind="random")
    points = run(make_suggester(config), plain, 5)
    assert points == [random_point(config.space, 0, number) for number in range(5)]
    assert make_suggester(config).suggest(3) == points[3]


def test_the_estimator_finds_the_bottom_of_a_quadratic_sooner_than_chance() -> None:
    count = 36
    learned = run(make_suggester(sweep()), plain, count)
    drawn = run(make_suggester(sweep(kind="random")), plain, count)
    late = [sorted(quadratic(point) for point in points[12:]) for points in (learned, drawn)]
    median = [values[len(values) // 2] for values in late]
    assert median[0] < 0.5 * median[1]
    assert min(late[0]) < 0.05


def test_a_constraint_keeps_it_away_from_what_is_better_but_forbidden() -> None:
    def judge(point: Values) -> Verdict:
        # Over x = 0, where the bottom is, is forbidden.
        return Verdict((quadratic(point),), (0.0, point["x"]))

    def share(points: Sequence[Values]) -> float:
        return sum(bool(point["x"] > 0) for point in points[12:]) / len(points[12:])

    assert share(run(make_suggester(sweep()), plain, 36)) > 0.6
    assert share(run(make_suggester(sweep()), judge, 36)) < 0.4


def test_a_point_has_its_sections_whole_and_conditional_keys_only_where_they_are_active() -> None:
    def judge(point: Values) -> Verdict:
        return Verdict((CLIPS.index(point["clip"]) + abs(point.get("x", 0.5)),), (0.0,))

    points = run(make_suggester(sweep(SECTIONS)), judge, 24)
    for point in points:
        assert point["clip"] in CLIPS
        assert ("x" in point) == (point["clip"] != CLIPS[0])
        assert type(point["n"]) is int
        assert 1 <= point["n"] <= 64
    assert all(point.get("x", 0.0) == float(f"{point.get('x', 0.0):.4g}") for point in points)
    # The first section is the best, and what it learns from.
    assert sum(point["clip"] == CLIPS[0] for point in points[8:]) > 16 / 3


@pytest.mark.parametrize(("kind", "space"), [("tpe", PLANE), ("tpe", SECTIONS), ("multi_objective", PLANE)])
def test_what_comes_next_is_the_same_after_a_resume_that_tells_in_another_order(kind: str, space: Any) -> None:
    further: dict[str, Any] = {"objective": {"further": ["dead_experts"]}} if kind == "multi_objective" else {}
    config = sweep(space, kind, **further)
    source = random.Random(0)

    def verdict(number: int) -> Verdict:
        losses = (source.random(), source.random()) if further else (source.random(),)
        return Verdict(losses, (float(number % 5 == 4), 0.1), 20 if number % 3 == 2 else None)

    straight = make_suggester(config)
    points: list[Values] = []
    told: dict[int, Verdict] = {}
    for number in range(14):
        values = straight.suggest(number)
        assert values is not None
        points.append(values)
        # Three at a time: those of the last two are still to be told; number 6 never is, as one that failed.
        if (done := number - 2) >= 0 and done != 6:
            told[done] = verdict(done)
            straight.tell(done, points[done], told[done])
    resumed = make_suggester(config)
    for number, values in enumerate(points):
        resumed.begun(number, values)
    for number in source.sample(sorted(told), len(told)):
        resumed.tell(number, points[number], told[number])
    # Nor does it matter that those were begun which are over.
    fresh = make_suggester(config)
    for number, values in enumerate(points):
        if number in told:
            fresh.tell(number, values, told[number])
        else:
            fresh.begun(number, values)
    expected = [straight.suggest(number) for number in (14, 15)]
    assert [resumed.suggest(number) for number in (14, 15)] == expected
    assert [fresh.suggest(number) for number in (14, 15)] == expected


def test_those_that_still_run_keep_others_away_from_where_they_are() -> None:
    judged = [(x / 10, (x / 10 - 0.3) ** 2) for x in range(-10, 10)]
    space = {"x": PLANE["x"]}

    def suggested(running: int) -> list[float]:
        suggester = make_suggester(sweep(space))
        for number, (x, loss) in enumerate(judged):
            suggester.tell(number, {"x": x}, Verdict((loss,), (0.0,)))
        for number in range(20, 20 + running):
            suggester.begun(number, {"x": 0.3})
        found = []
        for number in range(100, 115):
            values = suggester.suggest(number)
            assert values is not None
            found.append(abs(values["x"] - 0.3))
            suggester.tell(number, values, Verdict((9.0,), (1.0,)))  # nothing worth learning from
        return found

    assert sum(suggested(30)) > sum(suggested(0))


@pytest.mark.parametrize("outcome", ["pruned", "diverged"])
def test_what_was_ended_early_is_told_in_finite_numbers_that_it_can_take(outcome: Any) -> None:
    begun = Begun("t", 0, 0, {"x": 0.5, "y": 0.1}, "search", "/r")
    measures = {"val_loss": 5.5, "diverged": float(outcome == "diverged")}
    trial = TrialState(begun, ended=Ended("t", outcome, 20, 1.0, measures))
    config = sweep(objective={"constraints": {"dead_experts": 2.0}})
    verdict = Configuration(0, begun.values, (trial,)).verdict(config.objective)
    assert verdict is not None
    assert all(map(math.isfinite, verdict.objectives + verdict.violations))
    assert verdict.pruned_at == (20 if outcome == "pruned" else None)
    assert (verdict.violations[0] > 0) == (outcome == "diverged")
    suggester = make_suggester(config)
    suggester.tell(0, begun.values, verdict)
    for number in range(1, 9):
        values = suggester.suggest(number)
        assert values is not None
        suggester.tell(number, values, verdict)
