"""QK-Clip: heads whose attention logits grow too large get smaller query and key weights (Kimi K2, arXiv 2507.20534).

Shape legend: L blocks (the MTP block's last), H heads, J rows of one head in a weight.
"""

from dataclasses import dataclass

import torch

from moe.attention_logits import watch_logits
from moe.config.base import Config
from moe.config.model import ModelConfig
from moe.config.qk_clip import MaxLogitQkClipConfig, NoQkClipConfig
from moe.model import Transformer
from moe.parallel import Ranks
from moe.parameters import Parameter, ParameterSet
from moe.schedule import Moment
from moe.shards import held_rows
from moe.stability.technique import Technique


@dataclass(frozen=True)
class _HeadRows:
    """A weight whose rows are those of one head after the other."""

    layer: int
    parameter: Parameter
    exponent_J: torch.Tensor
    """Power of a head's factor that multiplies each of its rows, fp64."""
    first_row: int
    """The first row that this rank holds."""


class QkClip(Technique):
    """After a step that was taken: a head with ``S_max > threshold`` gets its logits times ``threshold / S_max``.

    ``S_max`` is the largest logit of the head, after the softmax scale, in the training forwards of the step: over all
    micro-batches and ranks, real queries and what they attend to. Forwards without gradients (evaluation, health
    figures, routing ahead) do not count.

    The factor g goes to the weights: sqrt(g) to a head's queries and to its keys; with latent attention to their parts
    without position, and g to the rotary part of the queries, since all heads share that part of the keys. Values stay
    as they are, and so do the moments of the optimizer, which the report does not mention (unconfirmed).
    """

    def __init__(self, config: MaxLogitQkClipConfig, model: ModelConfig, ranks: Ranks) -> None:
        self.threshold = config.threshold
        blocks = model.num_layers + model.mtp.depth
        self.largest_LH = torch.full((blocks, model.attention.num_heads), float("-inf"), device=ranks.device)

    def watch(self, model: Transformer) -> None:
        """Look at the logits of every forward with gradients."""
        self._attentions = [block.attention for block in model.blocks()]
        watch_logits(model.blocks(), self._see, torch.is_grad_enabled)

    def _see(self, layer: int, largest_H: torch.Tensor) -> None:
        self.largest_LH[layer] = self.largest_LH[layer].maximum(largest_H)

    def before_training(self, parameters: ParameterSet) -> None:
        """Find the weights of every head, and which of their rows are here."""
        named = {id(p.handle): p for p in parameters.all}
        weights = [
            (layer, named[id(attention.get_parameter(name))], exponents)
            for layer, attention in enumerate(self._attentions)
            for name, exponents in attention.logit_exponents().items()
        ]
        ranks = parameters.ranks
        held_PW = held_rows([p for _, p, _ in weights], ranks)
        self._weights = [
            _HeadRows(
                layer,
                parameter,
                torch.tensor(exponents, dtype=torch.float64),
                sum(held_W[: ranks.rank]) if parameter.placement == "sharded" else 0,
            )
            for (layer, parameter, exponents), held_W in zip(weights, held_PW, strict=True)
        ]

    def before_step(self, moment: Moment) -> None:
        """Forget the logits of the last step."""
        self.largest_LH.fill_(float("-inf"))

    @torch.no_grad()
    def edit_weights(self, parameters: ParameterSet, moment: Moment) -> dict[str, float]:
        """Scale the rows of heads above the threshold; the largest logit of all and the number of such heads."""
        largest_LH = parameters.ranks.max_over_world(self.largest_LH.clone()).double().cpu()
        clipped_LH = largest_LH > self.threshold
        factor_LH = torch.where(clipped_LH, self.threshold / largest_LH, 1.0)
        for weight in self._weights:
            if clipped_LH[weight.layer].any():
                # 1 to any power is 1: the other heads keep every bit.
                factor_R = (factor_LH[weight.layer].unsqueeze(1) ** weight.exponent_J).flatten()
                local = weight.parameter.local
                factor_R = factor_R[weight.first_row : weight.first_row + local.shape[0]]
                local.mul_(factor_R.unsqueeze(1).to(local))
        largest = float(largest_LH.max())
        return {
            "attention/logit_max": 0.0 if largest == float("-inf") else largest,  # no real query on any rank
            "train/qk_clipped_heads": float(clipped_LH.sum()),
        }


QK_CLIP: dict[type[Config], type[Technique]] = {NoQkClipConfig: Technique, MaxLogitQkClipConfig: QkClip}
