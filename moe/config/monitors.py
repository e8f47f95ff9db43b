"""Health figures that cost a forward of their own. ``monitors``."""

from pydantic import NonNegativeInt

from moe.config.base import Config


class MonitorsConfig(Config):
    """Activations, attention logits and the residual stream, measured without gradients beside training."""

    every_steps: NonNegativeInt = 50
    """Optimizer steps between measurements, each of one micro-batch; 0 is off. Events are measured as well: the first
    step of a stage, and a step whose loss or gradient is not finite, where the figures say which layer it is."""
