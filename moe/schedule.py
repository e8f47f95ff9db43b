"""Schedules: pure functions of the step."""

import math
from typing import assert_never

from moe.config.trainer import ConstantDecay, CosineDecay, ScheduleConfig


def lr_factor(schedule: ScheduleConfig, step: int) -> float:
    """Share of the peak learning rate at optimizer step ``step`` (from 0).

    Warm-up is linear and reaches the peak at its last step, so no step has a rate of zero.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    match schedule.decay:
        case ConstantDecay():
            return 1.0
        case CosineDecay(final_fraction=final):
            progress = (step + 1 - schedule.warmup_steps) / max(1, schedule.steps - schedule.warmup_steps)
            return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        case other:
            assert_never(other)
