"""The schedule as a pure function of the step: no state, so nothing of it is saved."""

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import assert_never

from moe.config.schedule import ConstantLr, CosineLr, LinearLr, LrConfig, OneMinusSqrtLr, Stage
from moe.config.trainer import TrainerConfig


@dataclass(frozen=True)
class Moment:
    """Where training is at one optimizer step, and what the schedule has for it."""

    step: int
    """Optimizer steps done before this one."""
    steps: int
    """Optimizer steps in all."""
    lr: float
    """Learning rate of this step."""
    global_batch_size: int
    """Sequences of this step, over all workers."""
    sequence_length: int
    """Tokens per sequence."""
    stage: int = 0
    """Which of the schedule's stages this is, from 0."""
    bias_update_rate: float | None = None
    """In place of the balance rule's own; None leaves that."""
    balance_coefficient: float | None = None
    """In place of the balance loss's own; None leaves that."""
    clip_max_norm: float | None = None
    """In place of the clip's own; None leaves that."""


def staged(by_stage: float | None, own: float) -> float:
    """A technique's own value, or what a stage has put in its place."""
    return own if by_stage is None else by_stage


@dataclass(frozen=True)
class _Span:
    """A stage with its place on the time line."""

    stage: Stage
    first_step: int
    steps: int
    first_token: int
    global_batch_size: int
    sequence_length: int

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.sequence_length


class Timeline:
    """All stages of a run, one after the other."""

    def __init__(self, config: TrainerConfig) -> None:
        self._peak_lr = config.optimizer.lr
        self._spans: list[_Span] = []
        step = token = 0
        for stage in config.schedule.as_stages():
            sequences, length = config.batch_of(stage)
            span = _Span(stage, step, config.steps_of(stage), token, sequences, length)
            self._spans.append(span)
            step += span.steps
            token += span.steps * span.tokens_per_step
        self.steps = step
        """Optimizer steps in all."""

    def at(self, step: int) -> Moment:
        """What the schedule has for optimizer step ``step`` (from 0); after the end, what it had last."""
        index = self._index(step)
        span = self._spans[index]
        progress = min(1.0, (step + 1 - span.first_step) / span.steps)
        return Moment(
            step=step,
            steps=self.steps,
            lr=self._peak_lr * lr_factor(span.stage.lr, progress),
            global_batch_size=span.global_batch_size,
            sequence_length=span.sequence_length,
            stage=index,
            bias_update_rate=span.stage.bias_update_rate,
            balance_coefficient=span.stage.balance_coefficient,
            clip_max_norm=span.stage.clip_max_norm,
        )

    def batch_shapes(self) -> set[tuple[int, int]]:
        """Sequences of a global batch and tokens of a sequence, of every stage."""
        return {(span.global_batch_size, span.sequence_length) for span in self._spans}

    def tokens_before(self, step: int) -> int:
        """Tokens of the batches of all steps before ``step``."""
        span = self._spans[self._index(step)]
        return span.first_token + (step - span.first_step) * span.tokens_per_step

    def _index(self, step: int) -> int:
        return bisect_right(self._spans, step, key=lambda span: span.first_step) - 1


def lr_factor(lr: LrConfig, progress: float) -> float:
    """Share of the peak learning rate at a step of a stage.

    ``progress`` is the share of the stage's steps that are done when this one is: in (0, 1], so that a warm-up has no
    step with a rate of zero and reaches its end at its last step.
    """
    match lr:
        case ConstantLr(fraction=fraction):
            return fraction
        case LinearLr(start=start, end=end):
            return start + (end - start) * progress
        case CosineLr(start=start, end=end):
            return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))
        case OneMinusSqrtLr(start=start, end=end):
            return end + (start - end) * (1 - math.sqrt(progress))
        case other:
            assert_never(other)
