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


class BatchBalanceLossConfig(Config):
    """Balance loss over the global batch (arXiv 2412.19437, section 4.5.3; arXiv 2501.11873).

    A sequence may then use few experts, as long as the batch uses all.
    """

    kind: Literal["batch"] = "batch"
    coefficient: PositiveFloat = 1e-4
    """Weight of the loss (alpha). The default is the sequence-wise one's, for comparison; a value of this project."""


BalanceLossConfig = Annotated[
    NoBalanceLossConfig | SequenceBalanceLossConfig | BatchBalanceLossConfig, Field(discriminator="kind")
]
