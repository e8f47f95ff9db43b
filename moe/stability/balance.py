"""Loss-free balancing: the expert bias follows the load (arXiv 2408.15664).

The bias takes part in the selection of experts only, never in a gate. The load of the batch just trained moves it for
the next batch: using the current batch's own load would leak later tokens into the choice for earlier ones.
"""

from collections.abc import Sequence

import torch

from moe.config.balance import NoBalanceConfig, SignBalanceConfig
from moe.config.base import Config
from moe.config.model import ModelConfig
from moe.layers.router import Router
from moe.parallel import Ranks
from moe.schedule import Moment
from moe.stability.technique import StepLoad, Technique


class SignBalance(Technique):
    """``b_i += u * sign(mean load - load_i)``, then ``b -= mean(b)``.

    Top-k selection does not see a shift common to all experts, so recentring changes no choice; without it the bias of
    a long run drifts to where fp32 steps of 1e-3 are coarse. (Recentring the signs instead would let their rounding add
    up: a mean of 2.5e-6 after 1000 updates.)
    """

    def __init__(self, config: SignBalanceConfig, model: ModelConfig, ranks: Ranks) -> None:
        self.rate = config.bias_update_rate

    @torch.no_grad()
    def after_step(self, routers: Sequence[Router], load: StepLoad, moment: Moment) -> None:
        """One update of every layer's bias from the load of the whole step."""
        rate = self.rate if moment.bias_update_rate is None else moment.bias_update_rate
        for router, count_E in zip(routers, load.counts_ME, strict=True):
            # sign(sum - n * count) is exact in integers; a mean in floating point is not.
            direction_E = (count_E.sum() - count_E.numel() * count_E).sign().to(torch.float32)
            bias_E = router.expert_bias_E.add_(direction_E, alpha=rate)
            bias_E.sub_(bias_E.double().mean())


BALANCE: dict[type[Config], type[Technique]] = {NoBalanceConfig: Technique, SignBalanceConfig: SignBalance}
