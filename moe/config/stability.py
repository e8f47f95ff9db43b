"""Stability techniques: one family a field, one class a technique, chosen by its ``kind``."""

from moe.config.anticipation import AnticipationConfig, NoAnticipationConfig
from moe.config.balance import BalanceConfig, SignBalanceConfig
from moe.config.balance_loss import BalanceLossConfig, SequenceBalanceLossConfig
from moe.config.base import Config
from moe.config.clip import ClipConfig, GlobalClipConfig
from moe.config.qk_clip import NoQkClipConfig, QkClipConfig
from moe.config.z_loss import LmZLossConfig, RouterZLossConfig


class StabilityConfig(Config):
    """Every stability technique, each a switch of its own."""

    balance: BalanceConfig = SignBalanceConfig()
    balance_loss: BalanceLossConfig = SequenceBalanceLossConfig()
    router_z_loss: RouterZLossConfig = RouterZLossConfig()
    lm_z_loss: LmZLossConfig = LmZLossConfig()
    clip: ClipConfig = GlobalClipConfig()
    anticipation: AnticipationConfig = NoAnticipationConfig()
    qk_clip: QkClipConfig = NoQkClipConfig()
