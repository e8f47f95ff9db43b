"""What a stability technique is: state, and the slots of the optimizer step that it uses.

The trainer calls every technique in each slot; one that does not use a slot inherits the empty one. A family (balance,
balance loss, clip ...) maps its config classes to implementations in its own module.

Shape legend: E routed experts, M MoE layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moe.batch import Batch
from moe.config.base import Config
from moe.config.model import ModelConfig
from moe.layers.router import Router, Routing
from moe.parameters import ParameterSet


@dataclass(frozen=True)
class BatchCounts:
    """What a whole global batch holds: the divisors that turn sums of one micro-batch into shares of the mean."""

    tokens: int
    """Predicted tokens."""
    mtp_tokens: int
    """Tokens predicted two ahead by multi-token prediction."""
    sequences: int


@dataclass(frozen=True)
class GradientNorms:
    """L2 norms of the reduced gradient before any clipping, over all ranks."""

    total: float
    groups: dict[str, float]


@dataclass(frozen=True)
class StepLoad:
    """Tokens sent to each expert in one optimizer step, int64 [M, E], over all micro-batches and ranks."""

    counts_ME: torch.Tensor


class Technique:
    """Base of all techniques, and the technique of every ``kind: none``: all slots are empty and there is no state."""

    def __init__(self, config: Config, model: ModelConfig) -> None:
        """Build from the technique's own config class and the model it will meet."""

    def loss_terms(self, batch: Batch, routings: Sequence[Routing], counts: BatchCounts) -> dict[str, torch.Tensor]:
        """Terms added to the loss of one micro-batch, by name; each is this micro-batch's share of the global mean."""
        return {}

    def on_gradients(self, parameters: ParameterSet, norms: GradientNorms) -> dict[str, float]:
        """Change reduced gradients in place before the update; returns figures to report."""
        return {}

    def after_step(self, routers: Sequence[Router], load: StepLoad) -> None:
        """Runs once after the optimizer step, and only if the step was taken."""

    def state(self) -> dict[str, torch.Tensor]:
        """Tensors, equal on every rank, that must be saved and rewound with the weights."""
        return {}
