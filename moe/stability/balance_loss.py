"""Auxiliary losses that push the router towards an even load. Layers whose experts follow from a token's id have none.

With identity experts in the pool, the losses are those of the experts with weights alone: the K highest raw affinities
are among all, but f counts and P normalises over the experts with weights, so that neither pulls tokens to or from
identities, which is the budget's business (LongCat-Flash, arXiv 2509.01322, section 2.1, has another term for these).

Shape legend: T tokens = B sequences x S positions, M MoE layers, E routed experts (without identities), K experts per
token.
"""

import torch

from moe.batch import Batch
from moe.config.balance_loss import BatchBalanceLossConfig, NoBalanceLossConfig, SequenceBalanceLossConfig
from moe.config.base import Config
from moe.config.model import ModelConfig, MoeConfig
from moe.layers.affinity import affinities, affinity_shares
from moe.layers.router import Routing
from moe.model import ModelOutput
from moe.parallel import Ranks
from moe.schedule import Moment, staged
from moe.stability.technique import BatchCounts, Technique


def raw_choices(routing: Routing, moe: MoeConfig) -> torch.Tensor:
    """1 at the K highest raw affinities of each token, fp32 [T, E], without gradient: neither bias nor groups count."""
    chosen_TE = torch.zeros_like(routing.logits_TE, requires_grad=False)
    # The highest logits have the highest affinities, and are told apart where affinities saturate or underflow.
    top_TK = routing.logits_TE.detach().topk(moe.top_k, dim=-1).indices
    return chosen_TE.scatter_(1, top_TK, 1.0)[:, : moe.num_experts]


def _shares(routing: Routing, moe: MoeConfig) -> torch.Tensor:
    """Affinities divided by their sum over the experts with weights, [T, E]."""
    if not moe.num_identity_experts:
        return affinity_shares(routing.logits_TE, routing.affinity_TE, moe.affinity)
    logits_TE = routing.logits_TE[:, : moe.num_experts]
    return affinity_shares(logits_TE, affinities(logits_TE, moe.affinity), moe.affinity)


def sequence_balance_sum(routing: Routing, sequences: int, moe: MoeConfig) -> torch.Tensor:
    """Sum over sequences of ``sum_i f_i P_i`` (DeepSeek-V3, arXiv 2412.19437, eq. 17-20).

    ``f_i = E / (K T) * (tokens whose K highest raw affinities include i)``: the bias plays no part, nor do groups.
    ``P_i`` is the mean over the sequence of the affinities normalised to sum 1. At perfect balance a sequence gives 1.
    With identity experts, ``moe.mean_experts`` stands for K in ``f_i``: a sequence of perfect balance gives 1 where its
    raw choices meet the budget, and twice that where they are twice as many.
    """
    share_TE, chosen_TE = _shares(routing, moe), raw_choices(routing, moe)
    share_BSE, chosen_BSE = (x.unflatten(0, (sequences, -1)) for x in (share_TE, chosen_TE))
    if routing.real_T is None:
        f_BE, p_BE = chosen_BSE.mean(dim=1), share_BSE.mean(dim=1)
    else:
        real_BS1 = routing.real_T.view(sequences, -1, 1)
        weight_BS1 = real_BS1 / real_BS1.sum(dim=1, keepdim=True).clamp(min=1)
        f_BE, p_BE = (chosen_BSE * weight_BS1).sum(dim=1), (share_BSE * weight_BS1).sum(dim=1)
    total: torch.Tensor = (f_BE * p_BE).sum() * (moe.num_experts / moe.mean_experts)
    return total


class SequenceBalanceLoss(Technique):
    """``alpha`` times the sequence-wise balance of every MoE layer, averaged over the sequences of the global batch."""

    def __init__(self, config: SequenceBalanceLossConfig, model: ModelConfig, ranks: Ranks) -> None:
        self.coefficient = config.coefficient
        self.moe = model.moe

    def loss_terms(
        self, batch: Batch, output: ModelOutput, counts: BatchCounts, moment: Moment
    ) -> dict[str, torch.Tensor]:
        """This micro-batch's share of the loss; empty where no layer chooses."""
        routings = output.routings[self.moe.hash_layers :]
        if not routings:
            return {}
        sequences = batch.ids_BL.shape[0]
        coefficient = staged(moment.balance_coefficient, self.coefficient)
        total = torch.stack([sequence_balance_sum(r, sequences, self.moe) for r in routings]).sum()
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
        self.coefficient, self.moe, self.ranks = config.coefficient, model.moe, ranks
        shape = (model.num_choosing_layers, model.moe.num_experts)
        self.count_ME = torch.zeros(shape, dtype=torch.int64, device=ranks.device)

    def before_step(self, moment: Moment) -> None:
        """Forget the last step's counts."""
        self.count_ME.zero_()

    def loss_terms(
        self, batch: Batch, output: ModelOutput, counts: BatchCounts, moment: Moment
    ) -> dict[str, torch.Tensor]:
        """This micro-batch's share of the loss; empty where no layer chooses. Collective."""
        routings, routed = output.routings[self.moe.hash_layers :], counts.routed(output)[self.moe.hash_layers :]
        if not routings:
            return {}
        self.count_ME += self.ranks.sum_over_world(torch.stack([_real_choices(r, self.moe) for r in routings]))
        f_ME = self.count_ME / self.count_ME.double().mean(dim=1, keepdim=True).clamp(min=1e-12)
        terms = []
        for routing, tokens, f_E in zip(routings, routed, f_ME.float(), strict=True):
            share_TE = _shares(routing, self.moe)
            if routing.real_T is not None:
                share_TE = share_TE * routing.real_T.unsqueeze(1)
            terms.append((share_TE.sum(dim=0) * f_E).sum() / tokens)
        return {"balance_loss": torch.stack(terms).sum() * staged(moment.balance_coefficient, self.coefficient)}


def _real_choices(routing: Routing, moe: MoeConfig) -> torch.Tensor:
    """Real tokens whose K highest raw affinities include each expert, int64 [E]."""
    chosen_TE = raw_choices(routing, moe)
    if routing.real_T is not None:
        chosen_TE = chosen_TE * routing.real_T.unsqueeze(1)
    return chosen_TE.sum(dim=0, dtype=torch.int64)


BALANCE_LOSS: dict[type[Config], type[Technique]] = {
    NoBalanceLossConfig: Technique,
    SequenceBalanceLossConfig: SequenceBalanceLoss,
    BatchBalanceLossConfig: BatchBalanceLoss,
}
