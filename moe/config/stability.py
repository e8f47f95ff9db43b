"""Stability techniques: one family a field, one class a technique, chosen by its ``kind``."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from moe.config.base import Config


class NoBalanceConfig(Config):
    """Expert biases stay where they are."""

    kind: Literal["none"] = "none"


class SignBalanceConfig(Config):
    """Loss-free balancing by the sign rule (arXiv 2408.15664), recentred to zero mean."""

    kind: Literal["sign"] = "sign"
    bias_update_rate: PositiveFloat = 1e-3
    """Step of the bias towards underloaded experts after each optimizer step (u; gamma in DeepSeek-V3)."""


BalanceConfig = Annotated[NoBalanceConfig | SignBalanceConfig, Field(discriminator="kind")]


class NoBalanceLossConfig(Config):
    """No auxiliary balance loss."""

    kind: Literal["none"] = "none"


class SequenceBalanceLossConfig(Config):
    """Sequence-wise balance loss (DeepSeek-V3, arXiv 2412.19437, eq. 17-20)."""

    kind: Literal["sequence"] = "sequence"
    coefficient: PositiveFloat = 1e-4
    """Weight of the loss (alpha)."""


BalanceLossConfig = Annotated[NoBalanceLossConfig | SequenceBalanceLossConfig, Field(discriminator="kind")]


class NoClipConfig(Config):
    """Gradients are used as they are."""

    kind: Literal["none"] = "none"


class GlobalClipConfig(Config):
    """All gradients scaled together so that their global L2 norm is at most ``max_norm``."""

    kind: Literal["global"] = "global"
    max_norm: PositiveFloat = 1.0


ClipConfig = Annotated[NoClipConfig | GlobalClipConfig, Field(discriminator="kind")]


class StabilityConfig(Config):
    """Every stability technique, each a switch of its own."""

    balance: BalanceConfig = SignBalanceConfig()
    balance_loss: BalanceLossConfig = SequenceBalanceLossConfig()
    clip: ClipConfig = GlobalClipConfig()
