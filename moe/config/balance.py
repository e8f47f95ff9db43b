"""Balancing without a loss: rules that move the expert bias. ``stability.balance``."""

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
