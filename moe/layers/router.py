"""The router: which experts a token goes to, and with what weight (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

Shape legend: T tokens, D model width, E experts (identity experts last), G expert groups, K choices per token,
C classes of documents.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from moe.config.model import EXPERTS_PER_GROUP_SCORE, MoeConfig
from moe.layers.affinity import affinities
from moe.layers.selection import above_threshold, real_choices


@dataclass(frozen=True)
class Routing:
    """One layer's decision for one micro-batch.

    ``load_E`` counts, as int64, the real tokens sent to each expert. It is returned rather than accumulated in the
    module, so that a forward that is repeated (recomputation, evaluation) cannot count twice. ``real_T`` says which
    tokens those are; None means all. ``ids_TK`` may be -1 (no expert, gate 0) where the number of experts varies.

    With classes of documents, ``load_CE`` counts each class by itself and ``domains_T`` says which class a token is of;
    both are None with one class.
    """

    logits_TE: torch.Tensor
    affinity_TE: torch.Tensor
    ids_TK: torch.Tensor
    gates_TK: torch.Tensor
    load_E: torch.Tensor
    real_T: torch.Tensor | None
    experts_T: torch.Tensor | None = None
    """Experts with weights that each token passes, int64; None where that is K for all."""
    load_CE: torch.Tensor | None = None
    domains_T: torch.Tensor | None = None


class Router(nn.Module):
    """Scores experts in fp32 and picks the K best by affinity plus bias; the bias never enters a gate."""

    expert_bias_E: torch.Tensor
    """With one class of documents."""
    expert_bias_CE: torch.Tensor
    """With more."""

    def __init__(self, hidden_size: int, config: MoeConfig) -> None:
        super().__init__()
        self.config = config
        self.is_ragged = config.selection.kind == "threshold"
        """Whether ids may be -1."""
        self.weight = nn.Parameter(torch.empty(config.router_outputs, hidden_size))
        # A buffer: no gradient, no decay, in the checkpoint. fp32 because steps of 1e-3 vanish in bf16.
        if config.bias_domains == 1:
            self.register_buffer("expert_bias_E", torch.zeros(config.router_outputs, dtype=torch.float32))
        else:
            shape = config.bias_domains, config.router_outputs
            self.register_buffer("expert_bias_CE", torch.zeros(shape, dtype=torch.float32))

    @property
    def biases(self) -> torch.Tensor:
        """Expert biases of every class of documents, [C, E], as a view."""
        return self.expert_bias_E.unsqueeze(0) if self.config.bias_domains == 1 else self.expert_bias_CE

    def biases_of(self, domains_T: torch.Tensor | None) -> torch.Tensor:
        """Expert biases that count for tokens of these classes (None: all of class 0), of a shape that suits [T, E]."""
        return self.biases[0] if domains_T is None else self.biases[domains_T]

    def forward(
        self,
        x_TD: torch.Tensor,
        real_T: torch.Tensor | None = None,
        chosen_TK: torch.Tensor | None = None,
        domains_T: torch.Tensor | None = None,
    ) -> Routing:
        """Route tokens [T, D]; ``real_T`` (bool) leaves padding out of the load.

        ``chosen_TK`` are expert ids to take instead of choosing: gates and load are then theirs. ``domains_T`` (int64)
        are the classes of the tokens' documents (None: all of class 0); with one class of biases they do not matter.
        """
        if self.config.bias_domains == 1:
            domains_T = None
        logits_TE = F.linear(x_TD.float(), self.weight)
        affinity_TE = affinities(logits_TE, self.config.affinity)
        ids_TK = self.select(affinity_TE.detach(), domains_T) if chosen_TK is None else chosen_TK
        if self.is_ragged:
            gates_TK = affinity_TE.gather(1, ids_TK.clamp(min=0)).masked_fill(ids_TK < 0, 0.0)
        else:
            gates_TK = affinity_TE.gather(1, ids_TK)
        if self.config.normalize_gates:
            gates_TK = gates_TK / (gates_TK.sum(dim=-1, keepdim=True) + 1e-20)
        gates_TK = gates_TK * self.config.routed_scaling_factor
        counted_TK = ids_TK if real_T is None else ids_TK[real_T]
        counted = counted_TK[counted_TK >= 0] if self.is_ragged else counted_TK.flatten()
        load_E = torch.bincount(counted, minlength=self.config.router_outputs)
        experts_T = (real_choices(ids_TK, self.config) >= 0).sum(dim=1) if self.config.experts_vary else None
        load_CE = None if self.config.bias_domains == 1 else self._load_of_classes(ids_TK, real_T, domains_T)
        return Routing(logits_TE, affinity_TE, ids_TK, gates_TK, load_E, real_T, experts_T, load_CE, domains_T)

    def _load_of_classes(
        self, ids_TK: torch.Tensor, real_T: torch.Tensor | None, domains_T: torch.Tensor | None
    ) -> torch.Tensor:
        """Real tokens of each class sent to each expert, int64 [C, E]."""
        classes, experts = self.config.bias_domains, self.config.num_experts
        cell_TK = ids_TK if domains_T is None else ids_TK + domains_T.unsqueeze(1) * experts
        counted_TK = cell_TK if real_T is None else cell_TK[real_T]
        return torch.bincount(counted_TK.flatten(), minlength=classes * experts).view(classes, experts)

    def select(self, affinity_TE: torch.Tensor, domains_T: torch.Tensor | None = None) -> torch.Tensor:
        """Expert ids [T, K], int64, ascending: the best by biased affinity inside the best groups.

        With thresholds all experts with a biased affinity above 0, up to K; -1 stands for those that are missing.

        A group's score is the sum of its two best affinities, biased or not by the config. Experts of other groups are
        masked with -inf, not with 0: biased affinities can be negative, and a masked 0 would then win.
        """
        c = self.config
        scores_TE = affinity_TE + self.biases_of(domains_T)
        if self.is_ragged:
            return above_threshold(scores_TE, c.max_choices)
        if c.top_groups < c.num_groups:
            scores_TGE = scores_TE.unflatten(1, (c.num_groups, -1))
            by_TGE = scores_TGE if c.group_score == "biased" else affinity_TE.unflatten(1, (c.num_groups, -1))
            group_scores_TG = by_TGE.topk(EXPERTS_PER_GROUP_SCORE, dim=-1).values.sum(dim=-1)
            chosen = group_scores_TG.topk(c.top_groups, dim=-1).indices
            barred_TG = torch.ones_like(group_scores_TG, dtype=torch.bool).scatter_(1, chosen, False)
            scores_TE = scores_TGE.masked_fill(barred_TG.unsqueeze(-1), float("-inf")).flatten(1)
        ids_TK = scores_TE.topk(c.top_k, dim=-1, sorted=False).indices
        # In an order that the bias has no say in: sums over K would otherwise round differently when it moves.
        return ids_TK.sort(dim=-1).values
