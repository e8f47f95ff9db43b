"""Auxiliary losses that push the router towards an even load.

Shape legend: T tokens = B sequences x S positions, E routed experts, K experts per token.
"""

import torch

from moe.batch import Batch
from moe.config.balance_loss import NoBalanceLossConfig, SequenceBalanceLossConfig
from moe.config.base import Config
from moe.config.model import Affinity, ModelConfig
from moe.layers.affinity import affinity_shares
from moe.layers.router import Routing
from moe.model import ModelOutput
from moe.parallel import Ranks
from moe.schedule import Moment
from moe.stability.technique import BatchCounts, Technique


def sequence_balance_sum(routing: Routing, sequences: int, affinity: Affinity) -> torch.Tensor:
    """Sum over sequences of ``sum_i f_i P_i`` (DeepSeek-V3, arXiv 2412.19437, eq. 17-20).

    ``f_i = E / (K T) * (tokens whose K highest raw affinities include i)``: the bias plays no part, nor do groups.
    ``P_i`` is the mean over the sequence of the affinities normalised to sum 1. At perfect balance a sequence gives 1.
    """
    logits_TE, k = routing.logits_TE, routing.ids_TK.shape[1]
    experts = logits_TE.shape[1]
    share_TE = affinity_shares(logits_TE, affinity)
    # The highest logits have the highest affinities, and are told apart where affinities saturate or underflow.
    chosen_TE = torch.zeros_like(share_TE, requires_grad=False)
    chosen_TE.scatter_(1, logits_TE.detach().topk(k, dim=-1).indices, 1.0)
    share_BSE, chosen_BSE = (x.unflatten(0, (sequences, -1)) for x in (share_TE, chosen_TE))
    if routing.real_T is None:
        f_BE, p_BE = chosen_BSE.mean(dim=1), share_BSE.mean(dim=1)
    else:
        real_BS1 = routing.real_T.view(sequences, -1, 1)
        weight_BS1 = real_BS1 / real_BS1.sum(dim=1, keepdim=True).clamp(min=1)
        f_BE, p_BE = (chosen_BSE * weight_BS1).sum(dim=1), (share_BSE * weight_BS1).sum(dim=1)
    total: torch.Tensor = (f_BE * p_BE).sum() * (experts / k)
    return total


class SequenceBalanceLoss(Technique):
    """``alpha`` times the sequence-wise balance of every MoE layer, averaged over the sequences of the global batch."""

    def __init__(self, config: SequenceBalanceLossConfig, model: ModelConfig, ranks: Ranks) -> None:
        self.coefficient = config.coefficient
        self.affinity = model.moe.affinity

    def loss_terms(
        self, batch: Batch, output: ModelOutput, counts: BatchCounts, moment: Moment
    ) -> dict[str, torch.Tensor]:
        """This micro-batch's share of the loss; empty for a dense model."""
        if not output.routings:
            return {}
        sequences = batch.ids_BL.shape[0]
        total = torch.stack([sequence_balance_sum(r, sequences, self.affinity) for r in output.routings]).sum()
        return {"balance_loss": total * (self.coefficient / counts.sequences)}


BALANCE_LOSS: dict[type[Config], type[Technique]] = {
    NoBalanceLossConfig: Technique,
    SequenceBalanceLossConfig: SequenceBalanceLoss,
}
