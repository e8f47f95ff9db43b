"""Gradient clipping."""

from moe.config.base import Config
from moe.config.clip import GlobalClipConfig, NoClipConfig
from moe.config.model import ModelConfig
from moe.optim import AdamW
from moe.parallel import Ranks
from moe.parameters import ParameterSet
from moe.schedule import Moment, staged
from moe.stability.technique import GradientNorms, Technique


class GlobalClip(Technique):
    """Scale every gradient by ``max_norm / norm`` where the global norm exceeds ``max_norm``."""

    def __init__(self, config: GlobalClipConfig, model: ModelConfig, ranks: Ranks) -> None:
        self.max_norm = config.max_norm

    def on_gradients(
        self, parameters: ParameterSet, norms: GradientNorms, optimizer: AdamW, moment: Moment
    ) -> dict[str, float]:
        """Clip in place."""
        max_norm = staged(moment.clip_max_norm, self.max_norm)
        factor = min(1.0, max_norm / (norms.total + 1e-6))
        if factor < 1.0:
            parameters.scale_gradients(factor)
        return {"clip_factor": factor}


CLIP: dict[type[Config], type[Technique]] = {NoClipConfig: Technique, GlobalClipConfig: GlobalClip}
