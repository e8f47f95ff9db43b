"""z-losses: penalties on the squared log-partition ``log sum exp`` of logits, which keep them from drifting.

A softmax does not see a shift common to all its logits, so nothing else stops one; large logits round coarsely and
give large gradients.

Shape legend: B sequences, S positions, T = B*S tokens, E routed experts, V vocabulary.
"""

import torch

from moe.batch import Batch
from moe.config.base import Config
from moe.config.model import ModelConfig
from moe.config.z_loss import LmZLossConfig, RouterZLossConfig
from moe.loss import counted_targets
from moe.model import ModelOutput
from moe.parallel import Ranks
from moe.schedule import Moment
from moe.stability.technique import BatchCounts, Technique


def _squares_sum(logits: torch.Tensor, counted: torch.Tensor | None) -> torch.Tensor:
    """Sum of ``(log sum exp)^2`` over the rows that count (None: all), fp32, 0-dimensional."""
    squares = logits.float().logsumexp(dim=-1).square()
    total: torch.Tensor = squares.sum() if counted is None else (squares * counted).sum()
    return total


class RouterZLoss(Technique):
    """``coefficient * mean over real tokens of (log sum_i exp(logit_i))^2``, summed over the MoE layers.

    ST-MoE, arXiv 2202.08906, section 3.3 and eq. 5. Each layer adds its own loss, as auxiliary losses do in Mesh
    TensorFlow, which ST-MoE is written in; so the pull on a router does not weaken with the model's depth.
    """

    def __init__(self, config: RouterZLossConfig, model: ModelConfig, ranks: Ranks) -> None:
        self.coefficient = config.coefficient

    def loss_terms(
        self, batch: Batch, output: ModelOutput, counts: BatchCounts, moment: Moment
    ) -> dict[str, torch.Tensor]:
        """This micro-batch's share of the loss; empty where the coefficient is 0."""
        if self.coefficient == 0.0 or not output.routings:
            return {}
        layers = zip(output.routings, counts.routed(output), strict=True)
        terms = [_squares_sum(routing.logits_TE, routing.real_T) / tokens for routing, tokens in layers]
        return {"router_z_loss": torch.stack(terms).sum() * self.coefficient}


class LmZLoss(Technique):
    """``coefficient * mean over predicted tokens of (log sum_v exp(logit_v))^2``, of the next token's logits.

    PaLM, arXiv 2204.02311, section 5. The logits of multi-token prediction come from the same head and are left out.
    """

    def __init__(self, config: LmZLossConfig, model: ModelConfig, ranks: Ranks) -> None:
        self.coefficient = config.coefficient

    def loss_terms(
        self, batch: Batch, output: ModelOutput, counts: BatchCounts, moment: Moment
    ) -> dict[str, torch.Tensor]:
        """This micro-batch's share of the loss; empty where the coefficient is 0."""
        if self.coefficient == 0.0:
            return {}
        counted_BS = None
        if batch.real_BL is not None:
            counted_BS = counted_targets(batch, output.logits.shape[1], 1) != -100
        return {"lm_z_loss": _squares_sum(output.logits, counted_BS) * (self.coefficient / counts.tokens)}


ROUTER_Z_LOSS: dict[type[Config], type[Technique]] = {RouterZLossConfig: RouterZLoss}
LM_Z_LOSS: dict[type[Config], type[Technique]] = {LmZLossConfig: LmZLoss}
