"""What the Trainer says of a step, of an evaluation, and what it can be asked for."""

from dataclasses import dataclass
from typing import Literal

import torch

from moe.monitors import Measurements
from moe.schedule import Moment
from moe.stability.detector import Reading

Request = Literal["stop", "save"]
REQUESTS: tuple[Request, ...] = ("stop", "save")


@dataclass(frozen=True)
class Report:
    """What happened in one optimizer step: host numbers, the same on every rank."""

    step: int
    """Optimizer steps done, this one included."""
    taken: bool
    """False where the update was refused, by a hook or because loss or gradient was not finite: then nothing has
    changed but the step's number, and what looks at steps as they come (detector, anticipated choices)."""
    moment: Moment
    """What the schedule had for it."""
    metrics: dict[str, float]
    requests: frozenset[Request] = frozenset()
    """What any rank has asked for since the last step."""
    layer_max_vio: tuple[float, ...] = ()
    """MaxVio of the step's load, per MoE layer."""
    layer_idle: tuple[int, ...] = ()
    """Experts that no token of the step reached, per MoE layer."""
    readings: tuple[Reading, ...] = ()
    """What the spike detector makes of the loss and of the gradient norm."""
    health: Measurements | None = None
    """Layer by layer, after the update, where this step was one to measure (``monitors.every_steps``)."""
    differing: tuple[str, ...] = ()
    """Names of parameters whose copies on several ranks were not the same when the step began."""


@dataclass(frozen=True)
class Evaluation:
    """Loss and load over held-out batches: host numbers, the same on every rank."""

    loss_sum: float
    """Nats over all predicted tokens."""
    tokens: int
    counts_ME: torch.Tensor | None
    """Tokens sent to each expert, identity experts left out, int64 [MoE layers, experts]; None for a dense model."""
