"""What follows from a study's config alone."""

from typing import Any

import pytest

from tests.tuning.study_file import GRID, LEFT, RIGHT, changed
from tuning.study_config import Grid, Quantity, StudyConfig

WHOLE = Grid(key="optimizer.lr", values=[0.1, 0.2, 0.4])


def study(**changes: Any) -> StudyConfig:
    return StudyConfig.model_validate(changed({key.replace("__", "."): value for key, value in changes.items()}))


@pytest.mark.parametrize(
    ("over", "points"),
    [
        ({"kind": "at", "value": 0.2}, [0.2]),
        ({"kind": "highest", "points": 2}, [0.2, 0.4]),
        ({"kind": "best"}, [0.1, 0.2, 0.4]),
        ({"kind": "mean"}, [0.1, 0.2, 0.4]),
        ({"kind": "sensitivity"}, [0.1, 0.2, 0.4]),
        ({"kind": "largest_stable"}, [0.1, 0.2, 0.4]),
    ],
)
def test_the_points_that_a_quantity_may_be_made_of(over: dict[str, Any], points: list[float]) -> None:
    quantity = Quantity.model_validate({"arm": "a", "measure": "diverged", "over": over})
    assert list(quantity.possible_points(WHOLE)) == points


def test_without_a_grid_there_is_one_point() -> None:
    config = study()
    assert config.points() == [None]
    assert list(Quantity.model_validate(LEFT).possible_points(None)) == [None]


def test_the_right_side_is_a_quantity_or_a_number() -> None:
    found = []
    for right in (RIGHT, 3, 0.5):
        [condition] = study(claims__0__conditions__0__right=right).claims[0].conditions
        found.append(condition.right)
    assert found == [Quantity(arm="b", measure="val_loss"), 3.0, 0.5]


def test_every_quantity_is_told_with_its_place() -> None:
    exercised = [{"quantity": RIGHT}]
    config = study(claims__0__exercised=exercised)
    places = ["claims.0.conditions.0.left", "claims.0.conditions.0.right", "claims.0.exercised.0.quantity"]
    assert [place for place, _ in config.quantities()] == places
    assert [quantity.arm for _, quantity in config.quantities()] == ["a", "b", "b"]


def test_a_study_loads_back_from_its_dump() -> None:
    over = {"kind": "highest", "points": 1}
    config = study(grid=GRID, claims__0__conditions__0__left={**LEFT, "over": over}, claims__0__conditions__0__right=2)
    assert StudyConfig.model_validate(config.model_dump(mode="json")) == config
