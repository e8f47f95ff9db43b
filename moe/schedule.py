"""Schedules: pure functions of the step."""

import math
from dataclasses import dataclass
from typing import assert_never

from moe.config.schedule import ConstantDecay, CosineDecay, ScheduleConfig


@dataclass(frozen=True)
class Moment:
    """Where training is at one optimizer step, as its schedule has it."""

    step: int
    """Optimizer steps done before this one."""
    steps: int
    """Optimizer steps in all."""
    lr: float
    """Learning rate of this step."""


def moment_at(schedule: ScheduleConfig, peak_lr: float, step: int) -> Moment:
    """The moment of optimizer step ``step`` (from 0)."""
    return Moment(step, schedule.steps, peak_lr * lr_factor(schedule, step))


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
