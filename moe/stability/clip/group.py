"""Clipping of dense, router and expert gradients apart."""

import math

from moe.config.clip import GroupClipConfig
from moe.config.model import ModelConfig
from moe.optim import Optimizer
from moe.parallel import Ranks
from moe.parameters import ParameterSet
from moe.schedule import Moment, staged
from moe.stability.clip.global_norm import factor_to
from moe.stability.technique import GradientNorms, Technique


class GroupClip(Technique):
    """Scale each group's gradients by ``max_norm / norm`` of the group where its norm exceeds its ``max_norm``."""

    def __init__(self, config: GroupClipConfig, model: ModelConfig, ranks: Ranks) -> None:
        self.config = config

    def on_gradients(
        self, parameters: ParameterSet, norms: GradientNorms, optimizer: Optimizer, moment: Moment
    ) -> dict[str, float]:
        """Clip in place. ``clip_factor`` is the global norm after over that before."""
        square = 0.0
        clipped = False
        for group, limit in self.config.limits(staged(moment.clip_max_norm, self.config.max_norm)).items():
            factor = factor_to(limit, norms.groups[group])
            square += (factor * norms.groups[group]) ** 2
            if factor < 1.0:
                parameters.scale_gradients(factor, group)
                clipped = True
        return {
            "clip_factor": math.sqrt(square) / norms.total if clipped else 1.0,
            "clipped": float(clipped),
        }
