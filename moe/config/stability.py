"""Stability techniques: one family a field, one class a technique, chosen by its ``kind``."""

from moe.config.balance import BalanceConfig, SignBalanceConfig
from moe.config.balance_loss import BalanceLossConfig, SequenceBalanceLossConfig
from moe.config.base import Config
from moe.config.clip import ClipConfig, GlobalClipConfig


class StabilityConfig(Config):
    """Every stability technique, each a switch of its own."""

    balance: BalanceConfig = SignBalanceConfig()
    balance_loss: BalanceLossConfig = SequenceBalanceLossConfig()
    clip: ClipConfig = GlobalClipConfig()
