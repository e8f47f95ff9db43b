"""AdaGC: each tensor is clipped to its own average norm (arXiv 2502.11034).

Shape legend: U units (see ``moe.units``: every parameter, and each expert's slice).
"""

import torch

from moe.config.clip import AdaGcClipConfig
from moe.config.model import ModelConfig
from moe.optim import Optimizer
from moe.parallel import Ranks
from moe.parameters import ParameterSet
from moe.schedule import Moment
from moe.stability.clip.global_norm import factor_to
from moe.stability.technique import GradientNorms, Technique
from moe.units import Units


class AdaGcClip(Technique):
    """Clip a tensor of norm ``g`` to ``relative_limit * average`` and average its clipped norm.

    During the warm-up all gradients are clipped together and ``average`` is the smallest clipped norm so far. As in the
    authors' code, a tensor without history passes unclipped and begins with the norm it has.

    An expert is a tensor of its own. One that got no token, whose gradient is exactly zero, keeps its average: pulled
    towards zero, it would strangle the expert's next gradient. (The rule for experts is this project's.)
    """

    def __init__(self, config: AdaGcClipConfig, model: ModelConfig, ranks: Ranks) -> None:
        self.config = config
        self.updates = torch.zeros((), dtype=torch.int64)
        # 0 is no history: the average of norms above 0 never is.
        self.average_U = torch.zeros(0, dtype=torch.float64)

    def before_training(self, parameters: ParameterSet) -> None:
        """Make room for the average of each unit."""
        self.units = Units(parameters.all, parameters.ranks)
        self.average_U = torch.zeros(len(self.units), dtype=torch.float64, device=parameters.ranks.device)

    def on_gradients(
        self, parameters: ParameterSet, norms: GradientNorms, optimizer: Optimizer, moment: Moment
    ) -> dict[str, float]:
        """Clip in place. ``clip_factor`` is the global norm after over that before."""
        gradients = [p.gradient for p in parameters.all]
        norm_U = self.units.norms(gradients)
        if int(self.updates) < self.config.warmup_steps:
            figures = self._warm_up(parameters, norms, norm_U)
        else:
            figures = self._clip(gradients, norm_U)
        self.updates += 1
        return figures

    def _warm_up(self, parameters: ParameterSet, norms: GradientNorms, norm_U: torch.Tensor) -> dict[str, float]:
        factor = factor_to(self.config.warmup_max_norm, norms.total)
        if factor < 1.0:
            parameters.scale_gradients(factor)
        clipped_U = norm_U * factor
        smallest_U = torch.where(self.average_U > 0, torch.minimum(self.average_U, clipped_U), clipped_U)
        self.average_U.copy_(torch.where(norm_U > 0, smallest_U, self.average_U))
        return {"clip_factor": factor, "clipped": float(factor < 1.0), "clipped_tensors": float(factor < 1.0)}

    def _clip(self, gradients: list[torch.Tensor], norm_U: torch.Tensor) -> dict[str, float]:
        average_U, decay = self.average_U, self.config.decay
        limit_U = self.config.relative_limit * average_U
        exceeds_U = (average_U > 0) & (norm_U > limit_U)
        clipped_U = torch.where(exceeds_U, limit_U, norm_U)
        factor_U = torch.where(exceeds_U, limit_U / norm_U, 1.0)
        torch._foreach_mul_(gradients, self.units.shares(factor_U, gradients))
        moved_U = torch.where(average_U > 0, decay * average_U + (1 - decay) * clipped_U, norm_U)
        self.average_U.copy_(torch.where(norm_U > 0, moved_U, average_U))
        after, before, share = torch.stack((clipped_U.norm(), norm_U.norm(), exceeds_U.double().mean())).tolist()
        return {"clip_factor": after / before if share else 1.0, "clipped": float(share > 0), "clipped_tensors": share}

    def state(self) -> dict[str, torch.Tensor]:
        """Average norm of each unit, fp64 [U] (0 before its first gradient), and updates made, int64."""
        return {"average": self.average_U, "updates": self.updates}
