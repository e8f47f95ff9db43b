"""Figures about routing, from the counts and logits of a step.

Shape legend: M MoE layers, E experts (identity experts last), T tokens, C classes of documents.
"""

import math
from collections.abc import Sequence

import torch

from moe.layers.router import Routing
from moe.traffic import Spread


def max_violation(counts_ME: torch.Tensor) -> torch.Tensor:
    """MaxVio of each layer, ``(max load - mean load) / mean load``, fp64 [M] (arXiv 2408.15664, section 4.1)."""
    load_ME = counts_ME.double()
    mean_M = load_ME.mean(dim=1)
    return (load_ME.amax(dim=1) - mean_M) / mean_M.clamp(min=1e-12)


def violation_figures(name: str, counts_ME: torch.Tensor, hash_layers: int) -> dict[str, float]:
    """``name``: MaxVio averaged over the layers that choose their experts; ``name_worst``: the largest of them.

    Nothing balances the first ``hash_layers`` layers, whose load is that of the tokens' frequencies: they would hide
    how even the others are. Empty where no layer chooses.
    """
    violation_M = max_violation(counts_ME[hash_layers:])
    if not len(violation_M):
        return {}
    return {name: float(violation_M.mean()), f"{name}_worst": float(violation_M.max())}


def bias_range(biases_ME: torch.Tensor) -> torch.Tensor:
    """Largest less smallest expert bias of each layer, [M]: what loss-free balancing has to hold against the router."""
    return biases_ME.amax(dim=1) - biases_ME.amin(dim=1)


def mean_pairwise_cosine(unit_sum_MD: torch.Tensor, experts: int) -> torch.Tensor:
    """Mean cosine over all pairs of a layer's expert vectors, [M] (LongCat-Flash, arXiv 2509.01322, section 3.1.3).

    ``unit_sum_MD`` is the sum of a layer's expert vectors, each of length 1, at least two of them: ``|sum|^2`` counts
    every pair twice, and each vector with itself once.
    """
    return (unit_sum_MD.double().square().sum(dim=1) - experts) / (experts * (experts - 1))


def real_expert_figures(sums: torch.Tensor, decisions: float) -> dict[str, float]:
    """Mean and standard deviation of the experts with weights of a token in a layer, and the share that has none.

    ``sums`` are ``RoutingStats.real_experts`` over all ranks, ``decisions`` the number of tokens times layers in them.
    """
    mean, square, none = (value / max(1.0, decisions) for value in sums.tolist())
    return {
        "moe/real_experts_mean": mean,
        "moe/real_experts_std": math.sqrt(max(0.0, square - mean**2)),
        "moe/real_experts_none": none,
    }


class RoutingStats:
    """Sums over the micro-batches of a step. Everything stays on the device until the step's one synchronisation."""

    def __init__(self, device: torch.device, nodes: Spread | None = None) -> None:
        """``nodes``: on which nodes experts live; None counts none."""
        self.nodes = nodes
        self.counts_ME: torch.Tensor | None = None
        """Load of every expert, int64; None until a model with experts has been seen."""
        self.counts_MCE: torch.Tensor | None = None
        """The same by class of the token's document; None with one class."""
        self.visits = torch.zeros((), dtype=torch.float64, device=device)
        """Distinct nodes that hold a token's experts, summed over real tokens and layers."""
        self.entropy = torch.zeros((), dtype=torch.float64, device=device)
        """Sum over real tokens and layers of the entropy of the normalised affinities, in nats."""
        self.logit_max = torch.zeros((), dtype=torch.float64, device=device)
        """Largest absolute router logit of a real token."""
        self.decisions = torch.zeros((), dtype=torch.float64, device=device)
        """Real tokens times layers."""
        self.real_experts: torch.Tensor | None = None
        """Where tokens differ in their number of experts with weights: sums over real tokens and layers of that number,
        of its square and of those that have none, fp64 [3]."""

    @torch.no_grad()
    def add(self, routings: Sequence[Routing]) -> None:
        """Count one micro-batch."""
        if not routings:
            return
        counts_ME = torch.stack([r.load_E for r in routings])
        self.counts_ME = counts_ME if self.counts_ME is None else self.counts_ME + counts_ME
        of_classes = [r.load_CE for r in routings if r.load_CE is not None]
        if of_classes:
            counts_MCE = torch.stack(of_classes)
            self.counts_MCE = counts_MCE if self.counts_MCE is None else self.counts_MCE + counts_MCE
        for routing in routings:
            share_TE = routing.affinity_TE / routing.affinity_TE.sum(dim=-1, keepdim=True).clamp(min=1e-20)
            entropy_T = torch.special.entr(share_TE).sum(dim=-1, dtype=torch.float64)
            logit_T = routing.logits_TE.abs().amax(dim=-1).double()
            if routing.real_T is not None:
                entropy_T, logit_T = (x_T.masked_fill(~routing.real_T, 0.0) for x_T in (entropy_T, logit_T))
            self.entropy += entropy_T.sum()
            self.logit_max = torch.maximum(self.logit_max, logit_T.amax())
            if routing.experts_T is not None:
                self._count_experts(routing.experts_T, routing.real_T)
            if self.nodes is not None:
                ids_TK = routing.ids_TK if routing.real_T is None else routing.ids_TK[routing.real_T]
                self.visits += self.nodes.parts_per_token(ids_TK).sum()
            self.decisions += logit_T.numel() if routing.real_T is None else routing.real_T.sum()

    def _count_experts(self, experts_T: torch.Tensor, real_T: torch.Tensor | None) -> None:
        sums_T = torch.stack((experts_T, experts_T.square(), (experts_T == 0).long()))
        if real_T is not None:
            sums_T = sums_T * real_T
        sums = sums_T.sum(dim=1).double()
        self.real_experts = sums if self.real_experts is None else self.real_experts + sums
