"""Loss-free balancing: the expert bias follows the load (arXiv 2408.15664).

The bias takes part in the selection of experts only, never in a gate. The load of the batch just trained moves it for
the next batch: using the current batch's own load would leak later tokens into the choice for earlier ones.

Shape legend: M bias vectors (one per MoE layer that chooses and class of documents), E routed experts.
"""

from collections.abc import Sequence

import torch

from moe.config.balance import (
    BudgetBalanceConfig,
    NoBalanceConfig,
    ProportionalBalanceConfig,
    QuantileBalanceConfig,
    SignBalanceConfig,
    SmebuBalanceConfig,
    ThresholdBalanceConfig,
)
from moe.config.base import Config
from moe.config.model import ModelConfig
from moe.layers.router import Router
from moe.parallel import Ranks
from moe.schedule import Moment, staged
from moe.stability.bias import biases_and_loads, move_bias, relative_shortage, update_factor
from moe.stability.budget import BudgetBalance
from moe.stability.quantile_balance import QuantileBalance
from moe.stability.technique import StepLoad, Technique
from moe.stability.threshold_balance import ThresholdBalance


class SignBalance(Technique):
    """``b_i += u * sign(mean load - load_i)``, then ``b -= mean(b)``."""

    def __init__(self, config: SignBalanceConfig, model: ModelConfig, ranks: Ranks) -> None:
        self.rate, self.schedule = config.bias_update_rate, config.schedule

    @torch.no_grad()
    def after_step(self, routers: Sequence[Router], load: StepLoad, moment: Moment) -> None:
        """One update of every layer's bias from the load of the whole step."""
        factor = staged(moment.bias_update_rate, self.rate) * update_factor(self.schedule, moment)
        for bias_E, count_E in biases_and_loads(routers, load):
            # sign(sum - n * count) is exact in integers; a mean in floating point is not.
            direction_E = (count_E.sum() - count_E.numel() * count_E).sign().to(torch.float32)
            move_bias(bias_E, direction_E, factor)


class ProportionalBalance(Technique):
    """``b_i += u * e_i`` with ``e_i = (mean load - load_i) / mean load``, then ``b -= mean(b)``.

    Source: the ablation of arXiv 2408.15664, section 4.3, whose unit of e is unconfirmed. Relative to the mean load, as
    here, the rate does not depend on the size of the batch. LongCat-Flash (arXiv 2509.01322, section 2.1) writes the
    same rule per routed token, ``mu * (1/N - T_i / (K T))``; with N experts, ``u = mu / N``.

    Updates vanish as the load evens out, so the bias does not keep on swinging by u as under the sign rule. Softmax
    affinities need this rule rather than the sign (same ablation).
    """

    def __init__(self, config: ProportionalBalanceConfig, model: ModelConfig, ranks: Ranks) -> None:
        self.rate, self.schedule = config.bias_update_rate, config.schedule

    @torch.no_grad()
    def after_step(self, routers: Sequence[Router], load: StepLoad, moment: Moment) -> None:
        """One update of every layer's bias from the load of the whole step."""
        factor = staged(moment.bias_update_rate, self.rate) * update_factor(self.schedule, moment)
        for bias_E, count_E in biases_and_loads(routers, load):
            move_bias(bias_E, relative_shortage(count_E), factor)


class SmebuBalance(Technique):
    """Soft-clamped momentum updates, SMEBU (Arcee Trinity Large, arXiv 2602.17004).

    ``v_i = (mean load - load_i) / mean load``, ``d = lambda * tanh(kappa * v)``, ``d -= mean(d)``,
    ``m = beta * m + (1 - beta) * d``, ``b += m``. Schedules are a factor on the last of these, so that a frozen bias
    rests whatever the momentum; that and the recentring of b against rounding are this project's.
    """

    def __init__(self, config: SmebuBalanceConfig, model: ModelConfig, ranks: Ranks) -> None:
        self.config = config
        self.momentum_ME = torch.zeros(model.num_biases, model.moe.num_experts, device=ranks.device)

    @torch.no_grad()
    def after_step(self, routers: Sequence[Router], load: StepLoad, moment: Moment) -> None:
        """One update of every layer's momentum and bias from the load of the whole step."""
        c = self.config
        factor = (
            update_factor(c.schedule, moment) * staged(moment.bias_update_rate, c.bias_update_rate) / c.bias_update_rate
        )
        for (bias_E, count_E), momentum_E in zip(biases_and_loads(routers, load), self.momentum_ME, strict=True):
            update_E = (c.kappa * relative_shortage(count_E)).tanh()
            update_E = c.bias_update_rate * (update_E - update_E.double().mean())
            momentum_E.mul_(c.momentum).add_(update_E, alpha=1 - c.momentum)
            move_bias(bias_E, momentum_E, factor)

    def state(self) -> dict[str, torch.Tensor]:
        """The momentum, fp32 [M, E]."""
        return {"momentum_ME": self.momentum_ME}


BALANCE: dict[type[Config], type[Technique]] = {
    NoBalanceConfig: Technique,
    SignBalanceConfig: SignBalance,
    ProportionalBalanceConfig: ProportionalBalance,
    SmebuBalanceConfig: SmebuBalance,
    QuantileBalanceConfig: QuantileBalance,
    BudgetBalanceConfig: BudgetBalance,
    ThresholdBalanceConfig: ThresholdBalance,
}
