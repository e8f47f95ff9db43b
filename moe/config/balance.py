"""Balancing without a loss: rules that move the expert bias. ``stability.balance``."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat

from moe.config.base import Config
from moe.config.model import MoeConfig

Share = Annotated[float, Field(ge=0, lt=1)]


class BiasScheduleConfig(Config):
    """Factor on every update of the bias: a linear warm-up, then 1, a linear decay to 0, and 0 to the end."""

    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up from 0 (exclusive) to the whole update."""
    decay_steps: NonNegativeInt = 0
    """Steps over which updates fall linearly to 0, just before the frozen ones."""
    frozen_steps: NonNegativeInt = 0
    """Last steps, in which biases rest; in DeepSeek-V3 the last 500 B of 14.8 T tokens (2412.19437, section 4.2)."""

    @property
    def steps(self) -> int:
        """Steps with a factor other than 1."""
        return self.warmup_steps + self.decay_steps + self.frozen_steps


class NoBalanceConfig(Config):
    """Expert biases stay where they are."""

    kind: Literal["none"] = "none"


class SignBalanceConfig(Config):
    """Loss-free balancing by the sign rule (arXiv 2408.15664), recentred to zero mean."""

    kind: Literal["sign"] = "sign"
    bias_update_rate: PositiveFloat = 1e-3
    """Step of the bias towards underloaded experts after each optimizer step (u; gamma in DeepSeek-V3)."""
    schedule: BiasScheduleConfig = BiasScheduleConfig()


class ProportionalBalanceConfig(Config):
    """Loss-free balancing by steps in proportion to the relative load error (arXiv 2408.15664, section 4.3)."""

    kind: Literal["proportional"] = "proportional"
    bias_update_rate: PositiveFloat = 1e-3
    """Step of the bias of an expert without any token (u); an expert with twice the mean load moves down as far."""
    schedule: BiasScheduleConfig = BiasScheduleConfig()


class SmebuBalanceConfig(Config):
    """Soft-clamped momentum updates of the bias, SMEBU (Arcee Trinity Large, arXiv 2602.17004).

    That the defaults are those of the report is unconfirmed.
    """

    kind: Literal["smebu"] = "smebu"
    bias_update_rate: PositiveFloat = 5e-4
    """Largest step of the bias (lambda)."""
    kappa: PositiveFloat = 2.0
    """Slope of the soft clamp: a relative load error of 1 / kappa makes 76 % of the largest step."""
    momentum: Share = 0.5
    """Share of the last update that is kept (beta)."""
    schedule: BiasScheduleConfig = BiasScheduleConfig()


class QuantileBalanceConfig(Config):
    """Quantile balancing (Su, kexue.fm 11619, February 2026; Kimi K3, arXiv 2607.24653): no rate to choose."""

    kind: Literal["quantile"] = "quantile"
    smoothing: Share = 0.0
    """Share of the old bias that is kept at each update; 0 takes the quantiles of the last batch alone."""
    schedule: BiasScheduleConfig = BiasScheduleConfig()


class BudgetBalanceConfig(Config):
    """Every expert with weights is held at an even share of model.moe.experts_per_token, beside identity experts
    (LongCat-Flash, arXiv 2509.01322, section 2.1).

    The biases of identity experts stay 0 and none is recentred: the mean of the others is what holds the budget.
    """

    kind: Literal["budget"] = "budget"
    bias_update_rate: PositiveFloat = 1e-2
    """Step of the bias of an expert without any token (u); an expert with twice its share moves down as far. In terms
    of the report's mu, which it does not give, u = mu * experts_per_token / (top_k * num_experts). The default, of this
    project, moves sigmoid affinities' biases by 1e-3 where a load is off by a tenth."""
    schedule: BiasScheduleConfig = BiasScheduleConfig()


class ThresholdBalanceConfig(Config):
    """Thresholds that let every expert have top_k / num_experts of the tokens (Su, "MoE tour, part 7", kexue.fm).

    For model.moe.selection.kind=threshold; biases are the thresholds negated, and are not recentred.
    """

    kind: Literal["threshold"] = "threshold"
    smoothing: Share = 0.9
    """Share of the old threshold that is kept at each update (lambda): thresholds follow affinities some
    smoothing / (1 - smoothing) steps behind."""
    schedule: BiasScheduleConfig = BiasScheduleConfig()


BalanceConfig = Annotated[
    NoBalanceConfig
    | SignBalanceConfig
    | ProportionalBalanceConfig
    | SmebuBalanceConfig
    | QuantileBalanceConfig
    | BudgetBalanceConfig
    | ThresholdBalanceConfig,
    Field(discriminator="kind"),
]


def balance_problem(balance: BalanceConfig, moe: MoeConfig, steps: int) -> str | None:
    """Why this rule cannot balance this model over so many optimizer steps, in one line; None if it can."""
    if problem := _other_number_of_experts(balance, moe):
        return problem
    if isinstance(balance, NoBalanceConfig):
        return None
    name = f"stability.balance.kind is {balance.kind}"
    if balance.schedule.steps > steps:
        return (
            "stability.balance.schedule: warmup_steps + decay_steps + frozen_steps "
            f"({balance.schedule.steps}) are more than all steps ({steps})"
        )
    # The sign rule is the default, which a dense model need not switch off.
    if moe.num_experts == 0 and not isinstance(balance, SignBalanceConfig):
        return f"{name}, but model.moe.num_experts is 0: there is no expert bias to move; set it to none"
    if isinstance(balance, QuantileBalanceConfig):
        if moe.top_groups < moe.num_groups:
            return (
                f"{name}, which is not defined for group-limited selection: set model.moe.top_groups to "
                f"model.moe.num_groups ({moe.num_groups}), or take another kind"
            )
        if moe.top_k >= moe.num_experts:
            return f"{name}, but model.moe.top_k is model.moe.num_experts ({moe.top_k}), so every load is even"
    return None


def _other_number_of_experts(balance: BalanceConfig, moe: MoeConfig) -> str | None:
    """Why this rule does not fit to how the model decides on the number of a token's experts."""
    name = f"stability.balance.kind is {balance.kind}"
    if isinstance(balance, NoBalanceConfig):
        if moe.experts_per_token is not None:
            return f"model.moe.experts_per_token is set, but {name}, and nothing holds it: set the kind to budget"
        return None
    # Other rules even out the load of all outputs alike and recentre: no mean is left that could hold a number.
    if isinstance(balance, BudgetBalanceConfig) != (moe.num_identity_experts > 0):
        if moe.num_identity_experts:
            return f"{name}, but model.moe.num_identity_experts is above 0: take budget, or none"
        return f"{name}, but model.moe.num_identity_experts is 0, so every token passes top_k; take another kind"
    if isinstance(balance, ThresholdBalanceConfig) != (moe.selection.kind == "threshold"):
        return f"{name}, but model.moe.selection.kind is {moe.selection.kind}: threshold takes threshold, or none"
    return None
