"""ZClip: the global norm is clipped where it is an outlier of its own recent past (arXiv 2504.02507)."""

import math

import torch

from moe.config.clip import ZClipConfig
from moe.config.model import ModelConfig
from moe.optim import Optimizer
from moe.parallel import Ranks
from moe.parameters import ParameterSet
from moe.schedule import Moment
from moe.stability.clip.global_norm import factor_to
from moe.stability.technique import GradientNorms, Technique


class ZClip(Technique):
    """Clip a norm ``g`` with ``z = (g - mean) / (std + 1e-6) > z_threshold`` to ``mean + z_threshold^2 std / z``.

    The further out, the closer to the mean it is brought. Mean and variance take in the norm as it was clipped by this
    rule (not by ``max_norm``), the variance around the mean just moved, as in the authors' code. During the warm-up
    they are the mean and population variance of the norms so far, unclipped.

    Steps that are not taken leave no trace: a norm that is not finite never gets here.
    """

    def __init__(self, config: ZClipConfig, model: ModelConfig, ranks: Ranks) -> None:
        self.config = config
        # On the host, where the norm is already: nothing waits for the device.
        self.mean, self.variance = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        self.norms_seen = torch.zeros((), dtype=torch.int64)

    def on_gradients(
        self, parameters: ParameterSet, norms: GradientNorms, optimizer: Optimizer, moment: Moment
    ) -> dict[str, float]:
        """Clip in place."""
        limit = self._take_in(norms.total)
        max_norm = self.config.max_norm if moment.clip_max_norm is None else moment.clip_max_norm
        if max_norm is not None:
            limit = min(limit, max_norm)
        factor = factor_to(limit, norms.total) if norms.total > limit else 1.0
        if factor < 1.0:
            parameters.scale_gradients(factor)
        return {"clip_factor": factor, "clipped": float(factor < 1.0)}

    def _take_in(self, norm: float) -> float:
        """The norm that the rule allows; mean and variance move on."""
        c, mean, variance = self.config, float(self.mean), float(self.variance)
        if int(self.norms_seen) < c.warmup_steps:
            self.norms_seen += 1
            shift = norm - mean
            mean += shift / int(self.norms_seen)
            variance += (shift * (norm - mean) - variance) / int(self.norms_seen)
            allowed = norm
        else:
            deviation = math.sqrt(variance)
            z = (norm - mean) / (deviation + 1e-6)
            allowed = mean + c.z_threshold * deviation / (z / c.z_threshold) if z > c.z_threshold else norm
            mean = c.decay * mean + (1 - c.decay) * allowed
            variance = c.decay * variance + (1 - c.decay) * (allowed - mean) ** 2
        self.mean.fill_(mean)
        self.variance.fill_(variance)
        return allowed

    def state(self) -> dict[str, torch.Tensor]:
        """Moving mean and variance of the norm, fp64, and the norms seen during the warm-up, int64."""
        return {"mean": self.mean, "variance": self.variance, "norms_seen": self.norms_seen}
