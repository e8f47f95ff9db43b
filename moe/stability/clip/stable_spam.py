"""Stable-SPAM: elements clipped by the tensor's usual maximum, tensors normalised (arXiv 2502.17055).

Shape legend: U units (see ``moe.units``: every parameter, and each expert's slice).
"""

from collections.abc import Iterator

import torch

from moe.config.clip import StableSpamClipConfig
from moe.config.model import ModelConfig
from moe.optim import Optimizer
from moe.parallel import Ranks
from moe.parameters import ParameterSet
from moe.schedule import Moment
from moe.stability.technique import GradientNorms, Technique
from moe.units import Units


class StableSpamClip(Technique):
    """Per tensor: adaptive spike-aware clipping, adaptive norm, and at intervals a reset of Adam's moments.

    With ``m``, ``a`` and ``b`` moving averages, corrected for their start at 0, of the largest ``|g|``, of the norm and
    of its square (both after the first rule):

    1. where ``|g| > m``: ``g *= m / max|g|``
    2. ``g *= a / (sqrt(b) + 1e-8) / ||g||``, so that a tensor's gradient has a norm of about 1 whatever its scale.

    A public copy of the authors' code counts the averages' correction from the last reset although the averages
    themselves live on, which lets every spike pass after a reset (a limit 300 times too high at the first); here it
    counts from the start. A tensor whose gradient is exactly zero, as an expert's without tokens, keeps its averages
    (this project's rule).
    """

    def __init__(self, config: StableSpamClipConfig, model: ModelConfig, ranks: Ranks) -> None:
        self.config = config
        self.updates = torch.zeros((), dtype=torch.int64)
        self.max_U = self.norm_U = self.norm_square_U = torch.zeros(0, dtype=torch.float64)
        self.seen_U = torch.zeros(0, dtype=torch.int64)

    def before_training(self, parameters: ParameterSet) -> None:
        """Make room for the averages of each unit."""
        self.units = Units(parameters.all, parameters.ranks)
        # In fp64: the first average, divided by its correction, must be the very maximum that it comes from.
        zeros_U = torch.zeros(len(self.units), dtype=torch.float64, device=parameters.ranks.device)
        self.max_U, self.norm_U, self.norm_square_U = zeros_U, zeros_U.clone(), zeros_U.clone()
        self.seen_U = zeros_U.long()

    def on_gradients(
        self, parameters: ParameterSet, norms: GradientNorms, optimizer: Optimizer, moment: Moment
    ) -> dict[str, float]:
        """Clip and normalise in place; ``clipped_fraction`` is the share of elements that the first rule changed."""
        self.updates += 1
        if int(self.updates) % self.config.reset_every_steps == 0:
            optimizer.reset()
        gradients = [p.gradient for p in parameters.all]
        max_U = self.units.maxima(gradients)
        live_U = max_U > 0
        self.seen_U += live_U
        limit_U = self._average(self.max_U, max_U, live_U, self.config.max_decay)
        fraction = self._clip(gradients, limit_U, torch.where(live_U, limit_U / max_U, 1.0))
        norm_U = self.units.norms(gradients)
        mean_U = self._average(self.norm_U, norm_U, live_U, self.config.norm_decay)
        mean_square_U = self._average(self.norm_square_U, norm_U.square(), live_U, self.config.norm_square_decay)
        scale_U = torch.where(norm_U > 0, mean_U / (mean_square_U.sqrt() + 1e-8) / norm_U, 1.0)
        torch._foreach_mul_(gradients, self.units.shares(scale_U, gradients))
        return {"clipped_fraction": fraction, "clipped": float(fraction > 0)}

    def _average(
        self, average_U: torch.Tensor, value_U: torch.Tensor, live_U: torch.Tensor, decay: float
    ) -> torch.Tensor:
        """Move ``average_U`` where a unit is live; the average corrected for its start at 0, fp64."""
        average_U.copy_(torch.where(live_U, decay * average_U + (1 - decay) * value_U, average_U))
        return average_U / (1 - decay ** self.seen_U.clamp(min=1).double())

    def _clip(self, gradients: list[torch.Tensor], limit_U: torch.Tensor, factor_U: torch.Tensor) -> float:
        """Shrink the elements above each unit's limit; their share."""

        def spikes() -> Iterator[torch.Tensor]:
            limits, factors = self.units.shares(limit_U, gradients), self.units.shares(factor_U, gradients)
            for gradient, limit, factor in zip(gradients, limits, factors, strict=True):
                spike = gradient.abs() > limit
                gradient.copy_(torch.where(spike, gradient * factor, gradient))
                yield spike

        return float(self.units.sums(spikes()).sum() / self.units.sizes_U.sum())

    def state(self) -> dict[str, torch.Tensor]:
        """Averages of each unit, fp64 [U], the gradients they have seen, int64 [U], and updates made, int64."""
        return {
            "max": self.max_U,
            "norm": self.norm_U,
            "norm_square": self.norm_square_U,
            "seen": self.seen_U,
            "updates": self.updates,
        }
