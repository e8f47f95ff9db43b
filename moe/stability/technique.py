"""What a stability technique is: state, and the slots of the optimizer step that it uses.

The trainer calls every technique in each slot; one that does not use a slot inherits the empty one. A family (balance,
balance loss, clip ...) maps its config classes to implementations in its own module.

Shape legend: E routed experts, M MoE layers, T tokens of this rank's share of a batch, K experts per token,
C classes of documents.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from moe.batch import Batch
from moe.config.base import Config
from moe.config.model import ModelConfig
from moe.layers.router import Router, Routing
from moe.model import ModelOutput, Transformer
from moe.optim import Optimizer
from moe.parallel import Ranks
from moe.parameters import ParameterSet
from moe.schedule import Moment, Timeline


@dataclass(frozen=True)
class BatchCounts:
    """What a whole global batch holds: the divisors that turn sums of one micro-batch into shares of the mean."""

    tokens: int
    """Predicted tokens."""
    mtp_tokens: int
    """Tokens predicted two ahead by multi-token prediction."""
    sequences: int
    inputs: int
    """Real tokens that go in, those that predict nothing included."""

    def routed(self, output: ModelOutput) -> list[int]:
        """Real tokens that each layer of ``output.routings`` routes."""
        layers = len(output.routings)
        if output.mtp_logits is None:
            return [self.inputs] * layers
        # The MTP block's layer is the last. It counts positions whose next token is real too, which are the predicted.
        return [self.inputs] * (layers - 1) + [self.tokens] * min(layers, 1)


@dataclass(frozen=True)
class GradientNorms:
    """L2 norms of the reduced gradient before any clipping, over all ranks."""

    total: float
    groups: dict[str, float]


@dataclass(frozen=True)
class StepLoad:
    """Tokens sent to each expert in one optimizer step, int64 [M, E], over all micro-batches and ranks.

    Identity experts are the last of the E. ``counts_MCE`` divides them by the class of the token's document; None where
    there is one class.
    """

    counts_ME: torch.Tensor
    counts_MCE: torch.Tensor | None = None

    def after(self, layers: int) -> "StepLoad":
        """That of all but the first ``layers`` MoE layers."""
        return StepLoad(self.counts_ME[layers:], None if self.counts_MCE is None else self.counts_MCE[layers:])


# Optimizer step (from 0) -> the expert ids [T, K] that each MoE layer of the model as it is chooses for this rank's
# share of that step's batch, its micro-batches joined. Collective.
Choose = Callable[[int], list[torch.Tensor]]


class Technique:
    """Base of all techniques, and the technique of every ``kind: none``: all slots are empty and there is no state.

    The slots are listed in the order of the step. Ranks advance in lockstep, so a slot may hold collectives.
    """

    def __init__(self, config: Config, model: ModelConfig, ranks: Ranks) -> None:
        """Build from the technique's own config class, the model it will meet, and this process's place."""

    def watch(self, model: Transformer) -> None:
        """Runs once, when the trainer is built and before the next: stands hooks on modules that it must see."""

    def before_training(self, parameters: ParameterSet) -> None:
        """Runs once, when the trainer is built: makes state whose size depends on the parameters."""

    def on_timeline(self, timeline: Timeline) -> None:
        """Runs once, when the trainer is built: makes state whose size depends on the batches."""

    def before_step(self, moment: Moment) -> None:
        """Runs before the first micro-batch: what is gathered during the step begins anew."""

    def before_forward(self, choose: Choose, moment: Moment) -> list[torch.Tensor] | None:
        """Expert ids for every MoE layer to take in this step instead of choosing, as ``choose`` gives them, or None.

        Runs before the first micro-batch; at most one technique of a run may give ids.
        """
        return None

    def after_forward(self, routers: Sequence[Router], routings: Sequence[Routing]) -> None:
        """Runs after the forward of every micro-batch of training, outside autograd; never in evaluation.

        ``routers`` hold the biases that the routings came from, unless their ids were given; those of hash layers
        choose nothing and are left out. A recomputed forward is not another one.
        """

    def loss_terms(
        self, batch: Batch, output: ModelOutput, counts: BatchCounts, moment: Moment
    ) -> dict[str, torch.Tensor]:
        """Terms added to the loss of one micro-batch, by name; each is this micro-batch's share of the global mean."""
        return {}

    def figures(self) -> dict[str, float]:
        """Figures of the step's forwards to report, by their whole names, whether the step is taken or not."""
        return {}

    def on_gradients(
        self, parameters: ParameterSet, norms: GradientNorms, optimizer: Optimizer, moment: Moment
    ) -> dict[str, float]:
        """Change reduced gradients in place before the update; returns figures to report."""
        return {}

    def lr_factor(self, moment: Moment) -> float:
        """Factor on the learning rate of this update, asked for after ``on_gradients``."""
        return 1.0

    def edit_weights(self, parameters: ParameterSet, moment: Moment) -> dict[str, float]:
        """Change weights in place after the optimizer step, if it was taken; metrics to report, by their full names."""
        return {}

    def after_step(self, routers: Sequence[Router], load: StepLoad, moment: Moment) -> None:
        """Runs once after the optimizer step, and only if the step was taken and the model has experts.

        ``routers`` and ``load`` are those of the layers that choose: hash layers are left out.
        """

    def state(self) -> dict[str, torch.Tensor]:
        """Tensors that must be saved and rewound with the weights: equal on every rank, or DTensors."""
        return {}
