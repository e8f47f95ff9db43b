"""How long to train, and what changes on the way. ``schedule``."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from moe.config.base import Config

Fraction = Annotated[float, Field(ge=0, le=1)]


class ConstantLr(Config):
    """The learning rate stays at a share of its peak."""

    kind: Literal["constant"] = "constant"
    fraction: Fraction = 1.0


class LinearLr(Config):
    """From ``start`` (exclusive) to ``end``, as shares of the peak, along a straight line."""

    kind: Literal["linear"] = "linear"
    start: Fraction = 0.0
    end: Fraction = 1.0


class CosineLr(Config):
    """From ``start`` (exclusive) to ``end``, as shares of the peak, along half a cosine."""

    kind: Literal["cosine"] = "cosine"
    start: Fraction = 1.0
    end: Fraction = 0.1


class OneMinusSqrtLr(Config):
    """From ``start`` (exclusive) to ``end``, as shares of the peak, by ``1 - sqrt(progress)`` (arXiv 2405.18392)."""

    kind: Literal["one_minus_sqrt"] = "one_minus_sqrt"
    start: Fraction = 1.0
    end: Fraction = 0.0


LrConfig = Annotated[ConstantLr | LinearLr | CosineLr | OneMinusSqrtLr, Field(discriminator="kind")]


class Stage(Config):
    """A part of training in which everything but the learning rate stays as it is."""

    steps: PositiveInt | None = None
    """Its length in optimizer steps."""
    tokens: PositiveInt | None = None
    """Its length in tokens of its batches, rounded up to whole steps; one of the two must be given."""
    lr: LrConfig = ConstantLr()
    """The learning rate as a share of optimizer.lr."""
    global_batch_size: PositiveInt | None = None
    """Sequences per optimizer step; null takes data.global_batch_size."""
    sequence_length: PositiveInt | None = None
    """Tokens per sequence, a divisor of data.sequence_length, which null takes: longer samples are read in parts."""
    bias_update_rate: NonNegativeFloat | None = None
    """In place of stability.balance.bias_update_rate; 0 lets the biases rest, as DeepSeek-V3 does at its end."""
    balance_coefficient: NonNegativeFloat | None = None
    """In place of stability.balance_loss.coefficient."""
    clip_max_norm: PositiveFloat | None = None
    """In place of stability.clip.max_norm."""

    @model_validator(mode="after")
    def _has_one_length(self) -> Self:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("a stage's length is either steps or tokens; give one of them")
        return self


class ConstantDecay(Config):
    """The learning rate stays at its peak after the warm-up."""

    kind: Literal["constant"] = "constant"


class CosineDecay(Config):
    """Half a cosine from the peak at the end of the warm-up to ``final_fraction`` of it at the last step."""

    kind: Literal["cosine"] = "cosine"
    final_fraction: Fraction = 0.1


class WsdDecay(Config):
    """Warm-up, stable, decay (MiniCPM, arXiv 2404.06395): the peak is held until the last ``decay_steps``."""

    kind: Literal["wsd"] = "wsd"
    decay_steps: PositiveInt
    shape: Literal["linear", "cosine", "one_minus_sqrt"] = "one_minus_sqrt"
    final_fraction: Fraction = 0.0
    """Share of the peak at the last step."""


DecayConfig = Annotated[ConstantDecay | CosineDecay | WsdDecay, Field(discriminator="kind")]


_FALLING: dict[str, type[LinearLr | CosineLr | OneMinusSqrtLr]] = {
    "linear": LinearLr,
    "cosine": CosineLr,
    "one_minus_sqrt": OneMinusSqrtLr,
}


class SimpleSchedule(Config):
    """Linear warm-up, then a decay; everything else stays as it is. A shorthand for two or three stages."""

    kind: Literal["simple"] = "simple"
    steps: PositiveInt = 500
    """Optimizer steps in all."""
    warmup_steps: NonNegativeInt = 50
    """Steps of linear warm-up from 0 (exclusive) to the peak."""
    decay: DecayConfig = CosineDecay()

    @model_validator(mode="after")
    def _its_parts_fit(self) -> Self:
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) is larger than steps ({self.steps})")
        if isinstance(self.decay, WsdDecay) and self.warmup_steps + self.decay.decay_steps > self.steps:
            raise ValueError(
                f"warmup_steps ({self.warmup_steps}) and decay.decay_steps ({self.decay.decay_steps}) "
                f"are more than steps ({self.steps})"
            )
        return self

    def as_stages(self) -> list[Stage]:
        """The same as stages."""
        stages = []
        rest = self.steps - self.warmup_steps
        if self.warmup_steps:
            stages.append(Stage(steps=self.warmup_steps, lr=LinearLr()))
        if isinstance(self.decay, WsdDecay):
            if stable := rest - self.decay.decay_steps:
                stages.append(Stage(steps=stable))
            fall = _FALLING[self.decay.shape]
            stages.append(Stage(steps=self.decay.decay_steps, lr=fall(start=1.0, end=self.decay.final_fraction)))
        elif rest:
            lr = CosineLr(end=self.decay.final_fraction) if isinstance(self.decay, CosineDecay) else ConstantLr()
            stages.append(Stage(steps=rest, lr=lr))
        return stages


class StagedSchedule(Config):
    """Stages, one after the other. A run's record says where each begins."""

    kind: Literal["stages"] = "stages"
    stages: list[Stage] = Field(min_length=1)

    def as_stages(self) -> list[Stage]:
        """The stages."""
        return self.stages


ScheduleConfig = Annotated[SimpleSchedule | StagedSchedule, Field(discriminator="kind")]
