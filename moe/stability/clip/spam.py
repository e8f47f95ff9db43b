"""SPAM: elements that spike against Adam's second moment are clipped, moments are reset (arXiv 2501.06842)."""

import math
from collections.abc import Iterator

import torch

from moe.config.clip import SpamClipConfig
from moe.config.model import ModelConfig
from moe.optim import AdamW, Optimizer
from moe.parallel import Ranks
from moe.parameters import ParameterSet
from moe.schedule import Moment
from moe.stability.technique import GradientNorms, Technique
from moe.units import Units


class SpamClip(Technique):
    """Where ``g^2 > threshold * v``, put ``sign(g) sqrt(threshold * v)``; every so many steps forget the moments.

    As in a public copy of the authors' code, ``v`` is the second moment before this update, without bias correction,
    and a reset comes right before update number ``reset_every_steps``, twice that, and so on. Unlike there
    - an element whose second moment is exactly 0 is not clipped: the embedding of a token not seen so far and an expert
      that no token has reached would get a gradient of 0, and so stay as they are for ever;
    - a reset starts the optimizer's bias correction anew: with moments of 0 and the correction of a long run the first
      update would be 0.45 of what it should be (betas 0.9 and 0.95);
    - the learning rate after a reset scales weight decay as well, as any warm-up does.
    """

    def __init__(self, config: SpamClipConfig, model: ModelConfig, ranks: Ranks) -> None:
        self.config = config
        self.updates = torch.zeros((), dtype=torch.int64)

    def before_training(self, parameters: ParameterSet) -> None:
        """Learn what is counted once over all ranks."""
        self.units = Units(parameters.all, parameters.ranks)

    def on_gradients(
        self, parameters: ParameterSet, norms: GradientNorms, optimizer: Optimizer, moment: Moment
    ) -> dict[str, float]:
        """Reset if it is time, then clip in place; ``clipped_fraction`` is the share of elements that were clipped."""
        self.updates += 1
        since_reset = int(self.updates) % self.config.reset_every_steps
        if since_reset == 0:
            optimizer.reset()
        if since_reset < self.config.settle_steps:
            return {"clipped_fraction": 0.0, "clipped": 0.0}
        if not isinstance(optimizer, AdamW):
            raise TypeError("SPAM needs a second moment of every parameter, which AdamW alone has")
        clipped = self.units.sums(self._clip(parameters, optimizer)).sum()
        fraction = float(clipped / self.units.sizes_U.sum())
        return {"clipped_fraction": fraction, "clipped": float(fraction > 0)}

    def _clip(self, parameters: ParameterSet, optimizer: AdamW) -> Iterator[torch.Tensor]:
        """Clip one parameter after the other; gives which elements were."""
        for p in parameters.all:
            limit = optimizer.exp_avg_sq[p.name].float().mul(self.config.threshold).sqrt_()
            limit.masked_fill_(limit == 0, torch.inf)
            gradient = p.gradient
            spike = gradient.abs() > limit
            gradient.clamp_(-limit, limit)
            yield spike

    def lr_factor(self, moment: Moment) -> float:
        """1, but for the updates after a reset: from 0.01 at the reset's own to 1 along half a cosine."""
        updates, c = int(self.updates), self.config
        since_reset = updates % c.reset_every_steps
        if updates < c.reset_every_steps or since_reset >= c.rewarmup_steps:
            return 1.0
        return 1.0 - 0.99 * 0.5 * (1.0 + math.cos(math.pi * since_reset / (c.rewarmup_steps + 1)))

    def state(self) -> dict[str, torch.Tensor]:
        """Updates made, int64."""
        return {"updates": self.updates}
