"""The budget of token-adaptive compute: a bias rule that holds the mean number of experts with weights per token.

Source: LongCat-Flash, arXiv 2509.01322, section 2.1, which moves the bias of each of N experts with weights by

    delta b_i = mu (K_e / (K N) - T_i / (K T))

where tokens choose K among these and identity experts, K_e is the intended mean number of the former, T_i the tokens
that expert i got and T all tokens; biases of identity experts stay 0. As b adds up these steps, this is an integral
controller.

Shape legend: E experts, identity experts last; N experts with weights.
"""

from collections.abc import Sequence

import torch

from moe.config.balance import BudgetBalanceConfig
from moe.config.model import ModelConfig
from moe.layers.router import Router
from moe.parallel import Ranks
from moe.schedule import Moment, staged
from moe.stability.bias import biases_and_loads, shift_bias, update_factor
from moe.stability.technique import StepLoad, Technique


class BudgetBalance(Technique):
    """``b_i += u * e_i`` with ``e_i = (share - T_i) / share`` and ``share = K_e T / N``, for experts with weights.

    The report's error is about ``K_e / (K N)`` for an expert without tokens, which is tiny; relative to the share, as
    here, a rate means the same for every size of model and batch, and ``u = mu K_e / (K N)``. There is no recentring:
    a shift of these biases against those of the identity experts, 0, is what meets the budget.
    """

    def __init__(self, config: BudgetBalanceConfig, model: ModelConfig, ranks: Ranks) -> None:
        self.rate, self.schedule, self.moe = config.bias_update_rate, config.schedule, model.moe

    @torch.no_grad()
    def after_step(self, routers: Sequence[Router], load: StepLoad, moment: Moment) -> None:
        """One update of every layer's bias from the load of the whole step."""
        factor = staged(moment.bias_update_rate, self.rate) * update_factor(self.schedule, moment)
        for bias_E, count_E in biases_and_loads(routers, load):
            shift_bias(bias_E[: self.moe.num_experts], self._shortage(count_E), factor)

    def _shortage(self, count_E: torch.Tensor) -> torch.Tensor:
        """``e`` of each expert with weights, fp32 [N], from integer counts; 0 where nothing was routed."""
        c = self.moe
        # Every token has K choices, so the counts of all experts, identities included, add up to K T.
        share = count_E.sum().double() * c.mean_experts / (c.top_k * c.num_experts)
        missing_N = share - count_E[: c.num_experts].double()
        return (missing_N / share.clamp(min=1e-12)).to(torch.float32)
