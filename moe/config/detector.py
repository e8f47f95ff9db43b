"""When a loss or a gradient norm is out of the ordinary. ``detector``."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from moe.config.base import Config


class NoDetectorConfig(Config):
    """Nothing but a loss or a gradient that is not finite is noticed."""

    kind: Literal["none"] = "none"


class RobustDetectorConfig(Config):
    """Two limits on how far a value lies above its own recent past, in robust standard deviations.

    Gradient norms have limits on their ratio to what was to be expected as well, since a single batch of ordinary text
    makes them jump, about once in a hundred steps by more than 5 deviations (tests.benchmarks.detector).
    """

    kind: Literal["robust"] = "robust"
    warn: PositiveFloat = 4.5
    """From here on a value is kept out of the past that later ones are compared with."""
    act: PositiveFloat = 6.0
    """From here on it is a spike, which the run notes. At least ``warn``."""
    warn_norm_ratio: PositiveFloat = 5.0
    """How many times what was to be expected a gradient norm must be in addition, for its reading to be a warning."""
    act_norm_ratio: PositiveFloat = 20.0
    """The same for it to be a spike. At least ``warn_norm_ratio``. Clipping takes care of what is below."""
    max_vio_rise: PositiveFloat = 0.5
    """By how much MaxVio must lie above what was to be expected in addition: the busiest expert has so many times the
    mean load more."""
    window: int = Field(default=200, ge=20)
    """Optimizer steps whose scatter is the unit of both limits; fewer than 20 would say nothing of it."""
    accept_after: PositiveInt = 20
    """So many values in a row that are kept out are a new level: the past begins anew with them."""

    @model_validator(mode="after")
    def _limits_are_in_order(self) -> "RobustDetectorConfig":
        if self.act < self.warn:
            raise ValueError(f"act ({self.act:g}) is below warn ({self.warn:g}); the limit to act on is the higher one")
        if self.act_norm_ratio < self.warn_norm_ratio:
            raise ValueError(
                f"act_norm_ratio ({self.act_norm_ratio:g}) is below warn_norm_ratio ({self.warn_norm_ratio:g}); "
                "the limit to act on is the higher one"
            )
        return self


DetectorConfig = Annotated[NoDetectorConfig | RobustDetectorConfig, Field(discriminator="kind")]
