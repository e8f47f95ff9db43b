import math
import random
from statistics import median

import pytest

from pipelines.figure import moving_average
from pipelines.history import UI_POINTS, History, WindowMaximum
from pipelines.spool import TRAIN, VALIDATION, Record

NAN = math.nan


def history(*records: tuple[str, int, dict[str, float]]) -> History:
    made = History()
    made.extend(Record.measured(kind, step, metrics) for kind, step, metrics in records)
    return made


def test_finals_are_the_last_finite_values_rounded() -> None:
    told = history(
        (TRAIN, 1, {"train/loss": 3.0}),
        (VALIDATION, 1, {"val/loss": 2.123456}),
        (TRAIN, 2, {"train/loss": 1.987654}),
        (TRAIN, 3, {"train/loss": NAN}),
    )
    assert told.finals() == {"final/loss": 1.9877, "final/val_loss": 2.1235, "final/diverged": 1.0}
    assert told.first_non_finite == {"train/loss": 3}
    assert told.last_step == 3
    shown = told.shown("train/loss")
    assert shown is not None
    assert math.isnan(shown)


def test_a_loss_that_came_back_has_not_diverged() -> None:
    told = history((TRAIN, 1, {"train/loss": NAN}), (TRAIN, 2, {"train/loss": 2.0, "train/update_norm": math.inf}))
    assert told.finals() == {"final/loss": 2.0, "final/diverged": 0.0}
    assert told.first_non_finite == {"train/loss": 1, "train/update_norm": 2}


def test_a_gradient_that_is_not_finite_is_a_divergence_though_the_loss_is() -> None:
    told = history((TRAIN, 1, {"train/loss": 2.0, "train/grad_norm": math.inf}))
    assert told.finals() == {"final/loss": 2.0, "final/diverged": 1.0}


def test_speed_leaves_out_the_start_up() -> None:
    speeds = [1.0, 2.0, 3.0, 110.0, 100.0, 90.0, 500.0]
    records = [(TRAIN, step, {"train/tokens_per_second": speed}) for step, speed in enumerate(speeds, 1)]
    assert history(*records).tokens_per_second == median(speeds[3:])
    assert history(*records[:2]).tokens_per_second == 1.5


@pytest.mark.parametrize(("steps", "every"), [(1, 1), (320, 1), (321, 1), (5000, 1), (5000, 7), (50, 10)])
def test_window_maxima_keep_every_spike_in_few_points(steps: int, every: int) -> None:
    values = [random.Random(step).random() for step in range(1, steps + 1)]
    window = WindowMaximum(steps, every)
    points = {step: found for step, value in enumerate(values, 1) if (found := window.update(step, value)) is not None}
    assert len(points) <= UI_POINTS
    assert window.length % every == 0
    ends = sorted(points)
    assert ends[-1] == steps
    for start, end in zip([0, *ends], ends, strict=False):
        assert points[end] == max(values[start:end])


@pytest.mark.parametrize("stopped_at", range(1, 12))
def test_a_resumed_run_finishes_the_window_that_it_stopped_in(stopped_at: int) -> None:
    steps = UI_POINTS * 5
    values = {step: random.Random(step).random() for step in range(1, 31)}
    whole = WindowMaximum(steps)
    expected = {step: whole.update(step, value) for step, value in values.items()}
    records = [Record.measured(TRAIN, step, {"train/loss": value}) for step, value in values.items()]
    resumed = WindowMaximum(steps)
    resumed.restore(records, stopped_at)
    rest = {step: resumed.update(step, value) for step, value in values.items() if step > stopped_at}
    assert rest == {step: value for step, value in expected.items() if step > stopped_at}


def test_window_maxima_leave_out_what_is_not_finite() -> None:
    window = WindowMaximum(UI_POINTS * 2)
    assert [window.update(step, value) for step, value in ((1, NAN), (2, 3.0), (3, NAN), (4, math.inf))] == [
        None,
        3.0,
        None,
        None,
    ]


@pytest.mark.parametrize("window", [1, 3, 7, 99])
def test_moving_average_is_the_mean_around_each_value(window: int) -> None:
    values = [random.Random(index).random() for index in range(20)]
    reach = window // 2
    expected = []
    for index in range(20):
        near = [value for other, value in enumerate(values) if abs(other - index) <= reach]
        expected.append(sum(near) / len(near))
    assert moving_average(values, window) == pytest.approx(expected)
