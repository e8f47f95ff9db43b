"""Auxiliary losses that push the router towards an even load. Layers whose experts follow from a token's id have none.

Shape legend: T tokens = B sequences x S positions, M MoE layers, E routed experts, K experts per token.
"""

import torch

from moe.batch import Batch
from moe.config.balance_loss import BatchBalanceLossConfig, NoBalanceLossConfig, SequenceBalanceLossConfig
from moe.config.base import Config
from moe.config.model import Affinity, ModelConfig
from moe.layers.affinity import affinity_shares
from moe.layers.router import Routing
from moe.model import ModelOutput
from moe.parallel import Ranks
from moe.schedule import Moment, staged
from moe.stability.technique import BatchCounts, Technique


def raw_choices(routing: Routing) -> torch.Tensor:
    """1 at the K highest raw affinities of each token, fp32 [T, E], without gradient: neither bias nor groups count."""
    chosen_TE = torch.zeros_like(routing.logits_TE, requires_grad=False)
    # The highest logits have the highest affinities, and are told apart where affinities saturate or underflow.
    top_TK = routing.logits_TE.detach().topk(routing.ids_TK.shape[1], dim=-1).indices
    return chosen_TE.scatter_(1, top_TK, 1.0)


def sequence_balance_sum(routing: Routing, sequences: int, affinity: Affinity) -> torch.Tensor:
    """Sum over sequences of ``sum_i f_i P_i`` (DeepSeek-V3, arXiv 2412.19437, eq. 17-20).

    ``f_i = E / (K T) * (tokens whose K highest raw affinities include i)``: the bias plays no part, nor do groups.
    ``P_i`` is the mean over the sequence of the affinities normalised to sum 1. At perfect balance a sequence gives 1.
    """
    experts, k = routing.logits_TE.shape[1], routing.ids_TK.shape[1]
    share_TE, chosen_TE = affinity_shares(routing.logits_TE, routing.affinity_TE, affinity), raw_choices(routing)
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
        self.affinity, self.hash_layers = model.moe.affinity, model.moe.hash_layers

    def loss_terms(
        self, batch: Batch, output: ModelOutput, counts: BatchCounts, moment: Moment
    ) -> dict[str, torch.Tensor]:
        """This micro-batch's share of the loss; empty where no layer chooses."""
        routings = output.routings[self.hash_layers :]
        if not routings:
            return {}
        sequences = batch.ids_BL.shape[0]
        coefficient = staged(moment.balance_coefficient, self.coefficient)
        total = torch.stack([sequence_balance_sum(r, sequences, self.affinity) for r in routings]).sum()
        return {"balance_loss": total * (coefficient / counts.sequences)}


class BatchBalanceLoss(Technique):
    """``alpha * sum_i f_i P_i`` of every MoE layer over the global batch (arXiv 2412.19437, section 4.5.3; 2501.11873).

    ``P_i`` is the mean of the normalised affinities over all real tokens of the step, of which each micro-batch adds
    its share. ``f_i = count_i / mean(count)`` counts tokens whose K highest raw affinities include i, over all ranks
    and the micro-batches of the step SO FAR: a micro-batch's gradient leaves before later ones are seen. With one
    micro-batch that is the loss of the global batch exactly; with more, the first see an f of fewer tokens. Ranks do
    not matter beyond which sequences are in a micro-batch together. Counts are integers.

    Per micro-batch there is one collective of ``8 M E`` bytes. At perfect balance a layer gives alpha.
    """

    def __init__(self, config: BatchBalanceLossConfig, model: ModelConfig, ranks: Ranks) -> None:
        self.coefficient, self.affinity, self.ranks = config.coefficient, model.moe.affinity, ranks
        self.hash_layers = model.moe.hash_layers
        shape = (model.num_choosing_layers, model.moe.num_experts)
        self.count_ME = torch.zeros(shape, dtype=torch.int64, device=ranks.device)

    def before_step(self, moment: Moment) -> None:
        """Forget the last step's counts."""
        self.count_ME.zero_()

    def loss_terms(
        self, batch: Batch, output: ModelOutput, counts: BatchCounts, moment: Moment
    ) -> dict[str, torch.Tensor]:
        """This micro-batch's share of the loss; empty where no layer chooses. Collective."""
        routings, routed = output.routings[self.hash_layers :], counts.routed(output)[self.hash_layers :]
        if not routings:
            return {}
        self.count_ME += self.ranks.sum_over_world(torch.stack([_real_choices(r) for r in routings]))
        f_ME = self.count_ME / self.count_ME.double().mean(dim=1, keepdim=True).clamp(min=1e-12)
        terms = []
        for routing, tokens, f_E in zip(routings, routed, f_ME.float(), strict=True):
            share_TE = affinity_shares(routing.logits_TE, routing.affinity_TE, self.affinity)
            if routing.real_T is not None:
                share_TE = share_TE * routing.real_T.unsqueeze(1)
            terms.append((share_TE.sum(dim=0) * f_E).sum() / tokens)
        return {"balance_loss": torch.stack(terms).sum() * staged(moment.balance_coefficient, self.coefficient)}


def _real_choices(routing: Routing) -> torch.Tensor:
    """Real tokens whose K highest raw affinities include each expert, int64 [E]."""
    chosen_TE = raw_choices(routing)
    if routing.real_T is not None:
        chosen_TE = chosen_TE * routing.real_T.unsqueeze(1)
    return chosen_TE.sum(dim=0, dtype=torch.int64)


BALANCE_LOSS: dict[type[Config], type[Technique]] = {
    NoBalanceLossConfig: Technique,
    SequenceBalanceLossConfig: SequenceBalanceLoss,
    BatchBalanceLossConfig: BatchBalanceLoss,
}
