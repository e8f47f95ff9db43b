import json
import math
from pathlib import Path

import pytest

from tuning.series import Series


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    written = Series(
        outcome="diverged",
        steps=40,
        train={"train/loss": [5.5, 0.1 + 0.2, 123456.789], "train/clipped": [0.0, 1.0, math.nan]},
        validation={"val/loss": 5.25, "moe/dead_experts": 3.0},
    )
    written.write(tmp_path / "trial" / "series.json")
    read = Series.read(tmp_path / "trial" / "series.json")
    assert read.outcome == "diverged"
    assert read.steps == 40
    assert read.train["train/loss"] == [5.5, 0.3, 123457.0]
    assert read.train["train/clipped"][:2] == [0.0, 1.0]
    assert math.isnan(read.train["train/clipped"][2])
    assert read.validation == {"val/loss": 5.25, "moe/dead_experts": 3.0}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null_in_the_file_and_nan_in_memory(tmp_path: Path, value: float) -> None:
    path = tmp_path / "series.json"
    Series("diverged", 2, {"train/loss": [1.0, value]}, {"val/loss": value}).write(path)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    content = json.loads(path.read_text(), parse_constant=refuse)
    assert content["train"]["train/loss"] == [1.0, None]
    read = Series.read(path)
    assert math.isnan(read.train["train/loss"][1])
    assert math.isnan(read.validation["val/loss"])


def test_a_series_that_misses_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="one value for each step"):
        Series("finished", 3, {"train/loss": [3.0, 2.0, 1.0], "train/clipped": [0.0, 1.0]}, {})


def test_nothing_else_is_left_beside_the_file(tmp_path: Path) -> None:
    for loss in (2.0, 1.0):
        Series("finished", 1, {"train/loss": [loss]}, {}).write(tmp_path / "series.json")
    assert [path.name for path in tmp_path.iterdir()] == ["series.json"]
    assert Series.read(tmp_path / "series.json").train == {"train/loss": [1.0]}
