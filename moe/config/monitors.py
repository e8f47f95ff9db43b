"""Health figures that cost a forward of their own, and checks of what should be equal. ``monitors``."""

from pydantic import NonNegativeInt

from moe.config.base import Config


class MonitorsConfig(Config):
    """Activations, attention logits and the residual stream, measured without gradients; copies of weights."""

    every_steps: NonNegativeInt = 50
    """Optimizer steps between measurements, each of one micro-batch; 0 is off. Events are measured as well: the first
    step of a stage, and a step whose loss or gradient is not finite, where the figures say which layer it is."""
    replicas_every_steps: NonNegativeInt = 5
    """Optimizer steps between comparisons of the weights of which several ranks hold copies; 0 is off. Copies that are
    not equal bit for bit are a fault of memory, kernel or link that nothing else shows. No more than
    ``response.guard_steps``, so that a rewind reaches a state from before the fault."""
