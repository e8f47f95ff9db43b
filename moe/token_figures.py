"""What each token of a batch costs and how well it is continued: the table behind studies of token-adaptive compute.

Shape legend: T predicted tokens of this rank, in the order of the batch.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from moe.batch import Batch
from moe.fsdp import release_gathered
from moe.loss import counted_targets
from moe.model import Transformer


@dataclass(frozen=True)
class TokenFigures:
    """One row per real position whose next token is real too; on the model's device."""

    ids_T: torch.Tensor
    """The token that stands there and is routed, int64."""
    targets_T: torch.Tensor
    """The token after it, which is predicted from there, int64."""
    losses_T: torch.Tensor
    """Nats of that prediction, fp32."""
    real_experts_T: torch.Tensor
    """Routed experts with weights that the position passes, summed over the layers, int64; 0 for a dense model. The
    block of multi-token prediction, which has no part in the prediction, is left out."""


@torch.no_grad()
def token_figures(model: Transformer, batch: Batch) -> TokenFigures:
    """The figures of this rank's ``batch``, which is on the model's device, in one forward without gradients.

    Collective where experts or dense parameters are divided: every rank must call it as often. Training state is not
    touched.
    """
    output = model(batch)
    release_gathered(model)
    length = output.logits.shape[1]
    targets_T = counted_targets(batch, length, 1).flatten()
    counted_T = targets_T != -100
    losses_T = F.cross_entropy(output.logits.flatten(0, 1).float(), targets_T, ignore_index=-100, reduction="none")
    experts_T = torch.zeros_like(targets_T)
    trunk = sum(model.config.is_moe_layer(layer) for layer in range(model.config.num_layers))
    for routing in output.routings[:trunk]:
        experts_T += model.config.moe.top_k if routing.experts_T is None else routing.experts_T
    ids_T = batch.ids_BL[:, :length].flatten()
    return TokenFigures(ids_T[counted_T], targets_T[counted_T], losses_T[counted_T], experts_T[counted_T])
