"""What the tests of anticipatory routing share: its configs, and a look at what routers decide."""

from typing import Any

import torch

from moe.batch import Batch
from moe.layers.router import Routing
from moe.model import Transformer
from moe.trainer import Trainer

LAG = 3
Changes = dict[str, Any]


def always(lag: int = LAG) -> Changes:
    return {"stability": {"anticipation": {"kind": "always", "lag": lag}}}


def triggered(at_steps: list[int], steps: int = LAG + 2, lag: int = LAG) -> Changes:
    return {"stability": {"anticipation": {"kind": "triggered", "lag": lag, "steps": steps, "at_steps": at_steps}}}


GROUPS: Changes = {"model": {"moe": {"num_groups": 4, "top_groups": 2, "top_k": 3}}}
PARTS: Changes = {"data": {"micro_batch_size": 2}}
STAGES: Changes = {
    "monitors": {"every_steps": 0},
    "schedule": {
        "kind": "stages",
        "stages": [
            {"steps": 3, "lr": {"kind": "linear"}, "global_batch_size": 4, "sequence_length": 8},
            {"steps": 3},
            {"steps": 6, "global_batch_size": 12, "sequence_length": 8},
        ],
    },
}
# Weights that do not move, so that the choices of any step are those of every other.
STILL: Changes = {
    "optimizer": {"lr": 1e-30},
    "stability": {"balance": {"kind": "none"}, "balance_loss": {"kind": "sequence", "coefficient": 1e-2}},
}


class RoutersSeen:
    """What the routers of a trainer decide in its training forwards, told apart by autograd being on."""

    def __init__(self, trainer: Trainer) -> None:
        self.calls: list[list[Routing]] = [[] for _ in trainer.routers]
        for layer, router in enumerate(trainer.routers):
            router.register_forward_hook(lambda _, args, routing, layer=layer: self._keep(layer, routing))

    def _keep(self, layer: int, routing: Routing) -> None:
        if torch.is_grad_enabled():
            self.calls[layer].append(routing)

    def of_step(self) -> list[Routing | Any]:
        """Since the last call: one per layer of a single micro-batch."""
        taken, self.calls = self.calls, [[] for _ in self.calls]
        assert all(len(calls) == 1 for calls in taken)
        return [calls[0] for calls in taken]

    def ids_of_step(self) -> list[torch.Tensor]:
        """Since the last call: each layer's ids, over all micro-batches."""
        taken, self.calls = self.calls, [[] for _ in self.calls]
        return [torch.cat([routing.ids_TK for routing in calls]) for calls in taken]


def ids_by(model: Transformer, batch: Batch) -> list[torch.Tensor]:
    """What every layer of ``model`` chooses in a whole ordinary forward."""
    with torch.no_grad():
        return [routing.ids_TK for routing in model(batch).routings]
