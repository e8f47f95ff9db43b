from typing import Any

import pytest
from pydantic import TypeAdapter

from tuning.quantities import Unmeasured, best_point, by_seed
from tuning.results import Results, TrialKey, TrialResult
from tuning.study_config import Grid, Quantity

POINTS = [0.001, 0.002, 0.004, 0.008]
GRID = Grid(key="optimizer.lr", values=POINTS)
# Least loss of arm a: seed 0 at the first point, seed 1 and the mean at the second. Arm b is best elsewhere.
TABLES: dict[tuple[str, int], dict[str, list[float]]] = {
    ("a", 0): {"val_loss": [1.0, 1.1, 1.6, 2.0], "loss_spikes": [1.0, 2.0, 4.0, 8.0], "diverged": [0, 0, 0, 1]},
    ("a", 1): {"val_loss": [1.5, 1.2, 1.3, 1.4], "loss_spikes": [3.0, 0.0, 5.0, 7.0], "diverged": [0, 1, 0, 0]},
    ("b", 0): {"val_loss": [4.0, 3.0, 2.0, 1.0], "loss_spikes": [0.5, 0.5, 0.5, 0.0], "diverged": [1, 0, 0, 0]},
    ("b", 1): {"val_loss": [4.0, 3.0, 2.0, 1.0], "loss_spikes": [0.5, 0.5, 0.5, 0.0], "diverged": [0, 0, 0, 0]},
}


def results() -> Results:
    trials = [
        TrialResult(TrialKey(seed, arm, point), {name: values[i] for name, values in table.items()})
        for (arm, seed), table in TABLES.items()
        for i, point in enumerate(POINTS)
    ]
    return Results(trials, ["a", "b"], POINTS)


def quantity(arm: str, measure: str, over: dict[str, Any] | None) -> Quantity:
    return TypeAdapter(Quantity).validate_python({"arm": arm, "measure": measure, "over": over})


@pytest.mark.parametrize(
    ("arm", "measure", "over", "expected"),
    [
        ("a", "loss_spikes", {"kind": "at", "value": 0.004}, [4.0, 5.0]),
        ("a", "loss_spikes", {"kind": "best"}, [2.0, 0.0]),
        ("b", "loss_spikes", {"kind": "best"}, [0.0, 0.0]),
        ("a", "loss_spikes", {"kind": "highest", "points": 2}, [6.0, 6.0]),
        ("a", "loss_spikes", {"kind": "highest", "points": 1}, [8.0, 7.0]),
        ("a", "loss_spikes", {"kind": "mean"}, [3.75, 3.75]),
        ("a", "val_loss", {"kind": "sensitivity"}, [(0.1 + 0.6 + 1.0) / 4, (0.3 + 0.1 + 0.2) / 4]),
        ("a", "diverged", {"kind": "largest_stable"}, [0.004, 0.001]),
        ("b", "diverged", {"kind": "largest_stable"}, [0.0, 0.008]),
    ],
)
def test_the_points_of_the_grid_become_one_number(
    arm: str, measure: str, over: dict[str, Any], expected: list[float]
) -> None:
    assert by_seed(quantity(arm, measure, over), results(), GRID) == pytest.approx(expected)


def test_the_best_point_is_one_for_all_seeds_of_an_arm() -> None:
    assert best_point("a", results(), POINTS) == 0.002
    assert best_point("b", results(), POINTS) == 0.008


def test_without_a_grid_it_is_the_measure_of_the_trial() -> None:
    trials = [TrialResult(TrialKey(seed, "a"), {"val_loss": 1.0 + seed}) for seed in (4, 2)]
    assert by_seed(quantity("a", "val_loss", None), Results(trials, ["a"], [None]), None) == [3.0, 5.0]


def test_a_measure_that_the_runs_do_not_have_is_a_mistake() -> None:
    with pytest.raises(ValueError, match=r"clip_rate is not among the measures of a-0.001-s0"):
        by_seed(quantity("a", "clip_rate", {"kind": "mean"}), results(), GRID)


def test_a_measure_that_a_run_diverged_before_is_none() -> None:
    tables = {key: table | {"dead_experts": [0.0, 0.0, 0.0, 0.0]} for key, table in TABLES.items()}
    trials = [
        TrialResult(
            TrialKey(seed, arm, point),
            {name: values[i] for name, values in table.items() if name != "dead_experts" or not table["diverged"][i]},
        )
        for (arm, seed), table in tables.items()
        for i, point in enumerate(POINTS)
    ]
    found = Results(trials, ["a", "b"], POINTS)
    assert by_seed(quantity("a", "dead_experts", {"kind": "at", "value": 0.001}), found, GRID) == [0.0, 0.0]
    with pytest.raises(Unmeasured, match=r"a-0.008-s0 diverged before dead_experts was measured"):
        by_seed(quantity("a", "dead_experts", {"kind": "mean"}), found, GRID)
