"""Affinities: how much a token wants each expert, from the router's logits. ``model.moe.affinity``.

Shape legend: T tokens, E routed experts.
"""

from typing import assert_never

import torch
import torch.nn.functional as F

from moe.config.model import Affinity

# Below this, softplus(x) is exp(x) to the last bit of fp32: the next term is exp(x)^2 / 2, and exp(-20) is 2e-9.
_EXPONENTIAL = -20.0


def affinities(logits_TE: torch.Tensor, kind: Affinity) -> torch.Tensor:
    """[T, E] -> the same shape: sigmoid(x) (DeepSeek-V3), softmax(x) or sqrt(softplus(x)) (DeepSeek-V4)."""
    match kind:
        case "sigmoid":
            return logits_TE.sigmoid()
        case "softmax":
            return logits_TE.softmax(dim=-1)
        case "sqrt_softplus":
            return _sqrt_softplus(logits_TE)
        case other:
            assert_never(other)


def affinity_shares(logits_TE: torch.Tensor, affinity_TE: torch.Tensor, kind: Affinity) -> torch.Tensor:
    """Affinities divided by their sum over the experts, [T, E].

    As a softmax of log-affinities this needs no epsilon, which a router could hide under by driving all its affinities
    towards 0.
    """
    match kind:
        case "sigmoid":
            return F.logsigmoid(logits_TE).softmax(dim=-1)
        case "softmax":
            return affinity_TE
        case "sqrt_softplus":
            return (0.5 * _log_softplus(logits_TE)).softmax(dim=-1)
        case other:
            assert_never(other)


def _sqrt_softplus(x: torch.Tensor) -> torch.Tensor:
    """sqrt(softplus(x)), whose slope exp(x/2) / 2 vanishes for very negative x.

    Taken as it stands, softplus underflows to 0 below -104, where the slope of the root is infinite and autograd's
    product infinity * 0. Each branch sees only inputs at which it is finite, for the same reason.
    """
    root = F.softplus(x.clamp(min=_EXPONENTIAL)).sqrt()
    return torch.where(x > _EXPONENTIAL, root, (0.5 * x.clamp(max=_EXPONENTIAL)).exp())


def _log_softplus(x: torch.Tensor) -> torch.Tensor:
    """log(softplus(x)), which is x for very negative x."""
    log = F.softplus(x.clamp(min=_EXPONENTIAL)).log()
    return torch.where(x > _EXPONENTIAL, log, x)
