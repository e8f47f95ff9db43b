"""How long to train, and what changes on the way. ``schedule``."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from moe.config.base import Config

Fraction = Annotated[float, Field(ge=0, le=1)]


class ConstantDecay(Config):
    """The learning rate stays at its peak after the warm-up."""

    kind: Literal["constant"] = "constant"


class CosineDecay(Config):
    """Half a cosine from the peak at the end of the warm-up to ``final_fraction`` of it at the last step."""

    kind: Literal["cosine"] = "cosine"
    final_fraction: Fraction = 0.1


DecayConfig = Annotated[ConstantDecay | CosineDecay, Field(discriminator="kind")]


class ScheduleConfig(Config):
    """How long to train, and the learning rate on the way."""

    steps: PositiveInt = 500
    """Optimizer steps in all."""
    warmup_steps: NonNegativeInt = 50
    """Steps of linear warm-up from 0 (exclusive) to the peak."""
    decay: DecayConfig = CosineDecay()

    @model_validator(mode="after")
    def _warmup_fits(self) -> "ScheduleConfig":
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) is larger than steps ({self.steps})")
        return self
