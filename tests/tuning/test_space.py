"""Points of a search space: all of a grid's, random ones, neighbours, and what a point is called."""

import itertools
import math
import random
from collections import Counter
from typing import Any

import pytest
from pydantic import TypeAdapter

from tuning.space import (
    Space,
    as_tree,
    corner_points,
    grid_points,
    label,
    neighbour,
    random_point,
    short_names,
    shuffled_grid,
)
from tuning.space_config import Dimension

NONE, GLOBAL = {"kind": "none"}, {"kind": "global", "max_norm": 1.0}
ADAPTER: TypeAdapter[dict[str, Dimension]] = TypeAdapter(dict[str, Dimension])


def space(**dimensions: Any) -> Space:
    return ADAPTER.validate_python(dimensions)


def choice(*values: Any, **when: list[Any]) -> dict[str, Any]:
    return {"kind": "choice", "values": list(values), "when": when}


MIXED = space(
    a=choice("x", "y"),
    rate={"kind": "log_uniform", "low": 1e-4, "high": 1.0},
    share={"kind": "uniform", "low": -1.0, "high": 3.0, "when": {"a": ["y"]}},
    count={"kind": "int", "low": 1, "high": 9},
    wide={"kind": "int", "low": 1, "high": 1000, "log": True},
)


def test_a_grid_has_every_combination_once() -> None:
    points = grid_points(space(a=choice(1, 2), b=choice(10, 20, 30), c=choice(NONE, GLOBAL)))
    expected = [{"a": a, "b": b, "c": c} for a, b, c in itertools.product((1, 2), (10, 20, 30), (NONE, GLOBAL))]
    assert points == expected


def test_a_conditional_key_is_in_a_grid_only_where_it_is_active() -> None:
    # By hand: a=1 alone (1); a=2 with b=10 (1) and with b=20 and either c (2). Listed before what it depends on.
    points = grid_points(space(c=choice(5, 6, b=[20]), b=choice(10, 20, a=[2]), a=choice(1, 2)))
    assert points == [{"a": 1}, {"a": 2, "b": 10}, {"a": 2, "b": 20, "c": 5}, {"a": 2, "b": 20, "c": 6}]


def test_a_key_of_two_conditions_needs_both() -> None:
    points = grid_points(space(a=choice(1, 2, 3), b=choice(1, 2), c=choice(5, 6, a=[1, 3], b=[2])))
    with_c = [point for point in points if "c" in point]
    assert len(points) == 6 + 2  # (1, 2) and (3, 2) are there twice
    assert {(point["a"], point["b"]) for point in with_c} == {(1, 2), (3, 2)}


def test_the_order_of_a_grid_is_that_of_its_seed_and_leaves_nothing_out() -> None:
    wide = space(a=choice(*range(6)), b=choice(*range(6)))
    first = shuffled_grid(wide, 0)
    assert first == shuffled_grid(wide, 0) != shuffled_grid(wide, 1)
    assert first != grid_points(wide)
    assert sorted(first, key=str) == sorted(grid_points(wide), key=str)


def test_random_points_lie_within_their_bounds_and_have_a_conditional_key_where_it_is_active() -> None:
    points = [random_point(MIXED, 0, number) for number in range(300)]
    for point in points:
        assert point["a"] in ("x", "y")
        assert ("share" in point) == (point["a"] == "y")
        assert -1 <= point.get("share", 0) <= 3
        assert 1e-4 <= point["rate"] <= 1
        assert point["count"] in range(1, 10)
        assert point["wide"] in range(1, 1001)
    assert {point["count"] for point in points} == set(range(1, 10))
    assert {type(point["wide"]) for point in points} == {int}


def test_a_random_point_depends_on_seed_and_number_alone() -> None:
    late = random_point(MIXED, 3, 17)
    for number in range(5):
        random_point(MIXED, 3, number)
    random.seed(1)
    assert random_point(MIXED, 3, 17) == late
    assert random_point(MIXED, 4, 17) != late != random_point(MIXED, 3, 18)


@pytest.mark.parametrize("key", ["rate", "wide"])
def test_each_order_of_magnitude_is_as_likely_as_the_other(key: str) -> None:
    low, orders = (1e-4, 4) if key == "rate" else (1.0, 3)
    draws = 3000
    found = Counter(
        min(int(math.log10(random_point(MIXED, 0, number)[key] / low)), orders - 1) for number in range(draws)
    )
    for order in range(orders):
        # Five standard deviations of a binomial.
        assert abs(found[order] - draws / orders) < 5 * math.sqrt(draws / orders)


def test_the_last_of_few_integers_is_drawn_too() -> None:
    few = space(count={"kind": "int", "low": 1, "high": 3, "log": True})
    found = Counter(random_point(few, 0, number)["count"] for number in range(1000))
    # Each from itself to the next: log 2, log 3/2 and log 4/3, of log 4.
    for value in (1, 2, 3):
        assert found[value] / 1000 == pytest.approx(math.log((value + 1) / value) / math.log(4), abs=0.07)


def test_a_uniform_key_is_uniform() -> None:
    uniform = space(share={"kind": "uniform", "low": -1.0, "high": 3.0})
    drawn = sorted(random_point(uniform, 0, number)["share"] for number in range(2000))
    # Kolmogorov and Smirnov: 1.63 / sqrt(n) is passed once in a hundred.
    assert max(abs((value + 1) / 4 - rank / 2000) for rank, value in enumerate(drawn)) < 1.63 / math.sqrt(2000)


def test_corners_have_both_ends_of_every_interval_with_every_value_of_the_lists() -> None:
    points = list(corner_points(MIXED))
    assert len(points) == 4
    assert {(p["a"], p["rate"], p.get("share"), p["count"], p["wide"]) for p in points} == {
        ("x", 1e-4, None, 1, 1),
        ("x", 1.0, None, 9, 1000),
        ("y", 1e-4, -1.0, 1, 1),
        ("y", 1.0, 3.0, 9, 1000),
    }


def test_a_neighbour_stays_in_the_space_and_near() -> None:
    plain = space(
        a=choice(NONE, GLOBAL, "z"),
        rate={"kind": "log_uniform", "low": 1e-4, "high": 1.0},
        count={"kind": "int", "low": 1, "high": 9},
    )
    source, point = random.Random(0), random_point(plain, 0, 0)
    places = [NONE, GLOBAL, "z"]
    for _ in range(500):
        near = neighbour(plain, point, source, 0.0)
        assert abs(places.index(near["a"]) - places.index(point["a"])) <= 1
        assert 1e-4 <= near["rate"] <= 1
        low, high = (min(max(point["rate"] * factor, 1e-4), 1.0) for factor in (0.8, 1.2))
        assert near["rate"] == pytest.approx(low, rel=1e-3) or near["rate"] == pytest.approx(high, rel=1e-3)
        assert near["count"] in range(1, 10)
        assert abs(near["count"] - point["count"]) <= max(1, round(0.2 * point["count"]))
        point = near


@pytest.mark.parametrize("start", [1, 2, 9])
def test_a_small_integer_comes_everywhere(start: int) -> None:
    # 1.2 times 2 is 2 again, when it is rounded.
    counted = space(count={"kind": "int", "low": 0, "high": 9})
    source, point, seen = random.Random(0), {"count": start}, set()
    for _ in range(3000):
        point = neighbour(counted, point, source, 0.0)
        seen.add(point["count"])
    assert seen == set(range(10))


def test_a_neighbour_that_is_drawn_anew_has_nothing_of_the_old_one() -> None:
    wide = space(rate={"kind": "log_uniform", "low": 1e-4, "high": 1.0})
    source = random.Random(0)
    drawn = [neighbour(wide, {"rate": 1.0}, source, 1.0)["rate"] for _ in range(200)]
    assert min(drawn) < 1e-3
    assert len(set(drawn)) > 150


def test_a_point_is_a_layer_of_a_config() -> None:
    values = {"stability.clip": GLOBAL, "optimizer.lr": 0.1, "optimizer.beta2": 0.9, "stability.balance.kind": "sign"}
    assert as_tree(values) == {
        "stability": {"clip": GLOBAL, "balance": {"kind": "sign"}},
        "optimizer": {"lr": 0.1, "beta2": 0.9},
    }
    # A key inside a section that another key chose, whichever comes first.
    assert as_tree({"stability.clip.kind": "global", "stability.clip.max_norm": 2.0}) == {
        "stability": {"clip": {"kind": "global", "max_norm": 2.0}}
    }


def test_names_are_as_short_as_they_are_clear() -> None:
    keys = ["optimizer.lr", "stability.clip.kind", "a.x.rate", "b.x.rate", "seeded", "x.rate"]
    assert short_names(keys) == {
        "optimizer.lr": "lr",
        "stability.clip.kind": "clip",
        "a.x.rate": "a.x.rate",
        "b.x.rate": "b.x.rate",
        "seeded": "seeded",
        "x.rate": "x.rate",
    }


def test_a_label_says_a_point_in_few_words() -> None:
    values = {"optimizer.lr": 3.0e-3, "stability.clip": GLOBAL, "other.clip": NONE, "w.warmup_steps": 1_000_000}
    names = short_names(list(values))
    assert label(values, names) == "lr=0.003 stability.clip=global(max_norm=1) other.clip=none warmup_steps=1000000"
