"""Quantile balancing: the bias that would have spread the last batch evenly, from quantiles instead of steps.

Source: Su, "MoE tour, part 6", kexue.fm 11619 (February 2026); Kimi K3, arXiv 2607.24653, which estimates the quantiles
by a histogram summed over all ranks (that its bins are chosen as here is not claimed).

With affinities s, n experts of which k are chosen and ``beta = -bias``, after every step

    alpha_i = (k+1)-th largest of ``s_i - beta`` over the experts, for every token i of the global batch
    beta_j  = (1 - k/n)-quantile of ``s_ij - alpha_i`` over those tokens, then beta -= mean(beta)

Expert j gets token i where ``s_ij - beta_j > alpha_i``, so the new beta lets k/n of the tokens through at every expert,
the thresholds alpha held. The tokens were routed by the old beta: selecting by the new one would leak later tokens
into the choice for earlier ones. For group-limited selection there is no such rule: a token's barred experts have no
finite margin, and where fewer than k/n of the tokens may choose an expert at all, its quantile is minus infinity.

With classes of documents each has a beta of its own, from its own tokens.

Shape legend: T tokens, M bias vectors (one per MoE layer that chooses and class of documents), E routed experts, C
classes, B bins.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch

from moe.config.balance import QuantileBalanceConfig, ThresholdBalanceConfig
from moe.config.model import Affinity, ModelConfig
from moe.layers.router import Router, Routing
from moe.parallel import Ranks
from moe.schedule import Moment
from moe.stability.bias import biases_and_loads, move_bias, shift_bias, update_factor
from moe.stability.technique import StepLoad, Technique

BINS = 512
FINEST = 1e-6
"""Margins below this are told apart by steps of equal size, those above by steps in proportion to them."""

_LIMITS: dict[Affinity, float] = {"sigmoid": 2.0, "softmax": 2.0, "sqrt_softplus": 128.0}


def margin_edges(affinity: Affinity) -> torch.Tensor:
    """Edges of the bins of ``s_ij - beta_j - alpha_i``, fp32 [B + 1], symmetric about an edge at 0.

    ``FINEST * sinh(h * i)``: what is to be measured is the quantile's distance from 0, where it lies at an even load,
    so bins grow with the distance. h is 0.06 for affinities between 0 and 1 (up to 2: they differ by at most 1, and so
    do the betas that follow from them) and 0.08 for sqrt_softplus (up to 128, which takes logits of 16,384); margins
    farther out count in the outermost bin. A bin at distance d is no wider than ``h exp(h) (d + FINEST)``.
    """
    half = torch.linspace(0, math.asinh(_LIMITS[affinity] / FINEST), BINS // 2 + 1, dtype=torch.float64).sinh() * FINEST
    return torch.cat((-half[1:].flip(0), half)).to(torch.float32)


def histogram_quantile(histogram_EB: torch.Tensor, edges: torch.Tensor, k: int) -> torch.Tensor:
    """(1 - k/E)-quantile of each expert's margins, fp32 [E]; 0 where nothing was counted.

    Linear inside the bin that holds the ``ceil(T (1 - k/E))``-th smallest margin (found in integers), so off that
    margin by less than the bin's width.
    """
    histogram_EB = histogram_EB.long()
    experts = histogram_EB.shape[0]
    up_to_EB = histogram_EB.cumsum(dim=1)
    total_E = up_to_EB[:, -1]
    wanted_E = total_E * (experts - k)  # times 1/E, as up_to is in what follows
    bin_E1 = (up_to_EB * experts < wanted_E.unsqueeze(1)).sum(dim=1, keepdim=True)
    inside_E = histogram_EB.gather(1, bin_E1).squeeze(1)
    below_E = up_to_EB.gather(1, bin_E1).squeeze(1) - inside_E
    share_E = (wanted_E - below_E * experts).double() / (inside_E * experts).clamp(min=1)
    low_E, high_E = edges.double()[bin_E1.squeeze(1)], edges.double()[bin_E1.squeeze(1) + 1]
    return torch.where(total_E > 0, low_E + share_E * (high_E - low_E), 0.0).to(torch.float32)


class QuantileBalance(Technique):
    """``b_j -= q_j``, then ``b -= mean(b)``, where q_j is the quantile of the margins ``s_ij - beta_j - alpha_i``.

    The same as the module's formula, since a quantile moves with a constant, but it needs resolution only near 0. With
    ``smoothing`` only ``1 - smoothing`` of q is taken, which leaves that share of the old beta in the new one. Padding
    is not counted. Per step there is one collective of ``4 M E B`` bytes.
    """

    recentres: ClassVar[bool] = True

    def __init__(
        self, config: QuantileBalanceConfig | ThresholdBalanceConfig, model: ModelConfig, ranks: Ranks
    ) -> None:
        self.config, self.ranks, self.k, self.classes = config, ranks, model.moe.top_k, model.moe.bias_domains
        self.edges = margin_edges(model.moe.affinity).to(ranks.device)
        shape = (model.num_biases, model.moe.num_experts, BINS)
        # int32 is exact here: a bin holds at most the tokens of a global batch.
        self.histogram_MEB = torch.zeros(shape, dtype=torch.int32, device=ranks.device)
        self.first_bin_E = torch.arange(model.moe.num_experts, device=ranks.device) * BINS

    def before_step(self, moment: Moment) -> None:
        """Forget the last step's margins."""
        self.histogram_MEB.zero_()

    def after_forward(self, routers: Sequence[Router], routings: Sequence[Routing]) -> None:
        """Count this micro-batch's margins."""
        of_layers = self.histogram_MEB.split(self.classes)
        for router, routing, histogram_CEB in zip(routers, routings, of_layers, strict=True):
            margin_TE = self.margins(router, routing)
            bin_TE = torch.bucketize(margin_TE, self.edges[1:-1], right=True) + self.first_bin_E
            if routing.domains_T is not None:
                bin_TE = bin_TE + routing.domains_T.unsqueeze(1) * histogram_CEB[0].numel()
            counted_TE = torch.ones_like(bin_TE, dtype=torch.int32)
            if routing.real_T is not None:
                counted_TE = counted_TE * routing.real_T.unsqueeze(1)
            histogram_CEB.view(-1).scatter_add_(0, bin_TE.flatten(), counted_TE.flatten())

    def margins(self, router: Router, routing: Routing) -> torch.Tensor:
        """``s_ij - beta_j - alpha_i``, [T, E]."""
        scores_TE = routing.affinity_TE + router.biases_of(routing.domains_T)
        return scores_TE - scores_TE.topk(self.k + 1, dim=-1).values[:, -1:]

    @torch.no_grad()
    def after_step(self, routers: Sequence[Router], load: StepLoad, moment: Moment) -> None:
        """One update of every layer's bias. Collective."""
        factor = (1.0 - self.config.smoothing) * update_factor(self.config.schedule, moment)
        histogram_MEB = self.ranks.sum_over_world(self.histogram_MEB)
        move = move_bias if self.recentres else shift_bias
        moved = biases_and_loads(routers, load)
        for (bias_E, _), histogram_EB in zip(moved, histogram_MEB, strict=True):
            move(bias_E, -histogram_quantile(histogram_EB, self.edges, self.k), factor)
