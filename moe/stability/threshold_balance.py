"""Thresholds that give every expert the same share of the tokens, from quantiles (Su, "MoE tour, part 7", kexue.fm).

With affinities s and thresholds beta, a token takes the experts with ``s_j > beta_j``. After every step

    beta_j <- lambda beta_j + (1 - lambda) * (1 - k/n)-quantile of ``s_ij`` over the tokens i of the global batch

so that each of n experts is taken by k/n of the tokens and a token takes k on average, though not each token. The
tokens were routed by the old beta: selecting by the new one would leak later tokens into the choice for earlier ones.
"""

from typing import ClassVar

import torch

from moe.layers.router import Router, Routing
from moe.stability.quantile_balance import QuantileBalance


class ThresholdBalance(QuantileBalance):
    """``b_j -= (1 - lambda) q_j`` with ``beta = -b`` and q_j the quantile of the margins ``s_ij - beta_j``.

    The same as the module's formula, since a quantile moves with a constant, but it needs resolution only near 0:
    histogram, padding and collective are those of ``QuantileBalance``. Not recentred: a threshold is no comparison.
    """

    recentres: ClassVar[bool] = False

    def margins(self, router: Router, routing: Routing) -> torch.Tensor:
        """``s_ij - beta_j``, [T, E]."""
        return routing.affinity_TE + router.biases_of(routing.domains_T)
