import math

import pytest

from moe.config.schedule import ConstantDecay, CosineDecay, ScheduleConfig
from moe.schedule import lr_factor


@pytest.mark.parametrize("warmup", [0, 1, 5, 12])
def test_warm_up_then_half_a_cosine(warmup: int) -> None:
    schedule = ScheduleConfig(steps=12, warmup_steps=warmup, decay=CosineDecay(final_fraction=0.2))
    for step in range(20):
        done = step + 1
        if done <= warmup:
            expected = done / warmup
        elif done >= 12:
            expected = 0.2
        else:
            expected = 0.2 + 0.8 * (math.cos(math.pi * (done - warmup) / (12 - warmup)) + 1) / 2
        assert lr_factor(schedule, step) == pytest.approx(expected), step
    assert max(lr_factor(schedule, step) for step in range(20)) <= 1.0


def test_constant_stays_at_the_peak_after_the_warm_up() -> None:
    schedule = ScheduleConfig(steps=10, warmup_steps=4, decay=ConstantDecay())
    assert [lr_factor(schedule, step) for step in range(7)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]
