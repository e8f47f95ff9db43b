"""Clipping of the whole gradient at a fixed norm."""

from moe.config.clip import GlobalClipConfig
from moe.config.model import ModelConfig
from moe.optim import Optimizer
from moe.parallel import Ranks
from moe.parameters import ParameterSet
from moe.schedule import Moment, staged
from moe.stability.technique import GradientNorms, Technique


class GlobalClip(Technique):
    """Scale every gradient by ``max_norm / norm`` where the global norm exceeds ``max_norm``."""

    def __init__(self, config: GlobalClipConfig, model: ModelConfig, ranks: Ranks) -> None:
        self.max_norm = config.max_norm

    def on_gradients(
        self, parameters: ParameterSet, norms: GradientNorms, optimizer: Optimizer, moment: Moment
    ) -> dict[str, float]:
        """Clip in place."""
        factor = factor_to(staged(moment.clip_max_norm, self.max_norm), norms.total)
        if factor < 1.0:
            parameters.scale_gradients(factor)
        return {"clip_factor": factor, "clipped": float(factor < 1.0)}


def factor_to(max_norm: float, norm: float) -> float:
    """What a gradient of norm ``norm`` is multiplied by to have at most ``max_norm``, as torch's own clipping does."""
    return min(1.0, max_norm / (norm + 1e-6))
