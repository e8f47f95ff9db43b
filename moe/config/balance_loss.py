"""Auxiliary losses for an even load. ``stability.balance_loss``."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from moe.config.base import Config


class NoBalanceLossConfig(Config):
    """No auxiliary balance loss."""

    kind: Literal["none"] = "none"


class SequenceBalanceLossConfig(Config):
    """Sequence-wise balance loss (DeepSeek-V3, arXiv 2412.19437, eq. 17-20)."""

    kind: Literal["sequence"] = "sequence"
    coefficient: PositiveFloat = 1e-4
    """Weight of the loss (alpha)."""


BalanceLossConfig = Annotated[NoBalanceLossConfig | SequenceBalanceLossConfig, Field(discriminator="kind")]
