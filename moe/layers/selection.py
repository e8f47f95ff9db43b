"""Choices whose number varies by token: identity experts in the pool, and experts above thresholds.

Ids of a token's choices have a fixed width. What is no expert with weights is -1 where experts are looked up; dispatch
and experts pass over it, so it costs neither a row nor a byte.

Shape legend: T tokens, D model width, E outputs of the router, K choices per token.
"""

import math
from statistics import NormalDist

import torch

from moe.config.model import ModelConfig, MoeConfig
from moe.config.selection import ThresholdSelectionConfig
from moe.layers.affinity import affinities


def real_choices(ids_TK: torch.Tensor, config: MoeConfig) -> torch.Tensor:
    """Ids of experts with weights [T, K], -1 where a choice is an identity expert or none."""
    if not config.num_identity_experts:
        return ids_TK
    return ids_TK.masked_fill(ids_TK >= config.num_experts, -1)


def identity_sum(x_TD: torch.Tensor, ids_TK: torch.Tensor, gates_TK: torch.Tensor, config: MoeConfig) -> torch.Tensor:
    """What a token's identity experts give: x times the sum of their gates, [T, D] (arXiv 2509.01322, section 2.1)."""
    gate_T1 = gates_TK.masked_fill(ids_TK < config.num_experts, 0.0).sum(dim=1, keepdim=True)
    return x_TD * gate_T1.to(x_TD.dtype)


def above_threshold(scores_TE: torch.Tensor, most: int) -> torch.Tensor:
    """Ids [T, most] of the experts whose score is above 0, ascending after -1 for each that is missing.

    Of more than ``most`` the highest scores are taken.
    """
    best = scores_TE.topk(most, dim=-1, sorted=False)
    return best.indices.masked_fill(~(best.values > 0), -1).sort(dim=-1).values


def starting_bias(config: ModelConfig) -> float:
    """The expert bias before the first step: 0, or minus the threshold that top_k of num_experts are expected above.

    With weights drawn by ``model.init`` and router inputs of root mean square 1, router logits are normal with standard
    deviation ``s = init.std sqrt(hidden_size)``; k of n of them lie above ``z = s * Phi^-1(1 - k/n)``, and affinities
    above that of z (Su, "MoE tour, part 7", kexue.fm). Under a softmax of many logits that is
    ``exp(z) / (n exp(s^2 / 2))``.
    """
    moe = config.moe
    if not isinstance(moe.selection, ThresholdSelectionConfig):
        return 0.0
    std = config.init.std * math.sqrt(config.hidden_size)
    logit = std * NormalDist().inv_cdf(1 - moe.top_k / moe.num_experts)
    if moe.affinity == "softmax":
        return -math.exp(logit - std**2 / 2) / moe.num_experts
    return -float(affinities(torch.tensor([[logit]]), moe.affinity))
