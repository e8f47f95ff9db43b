"""The state of training: what is saved, moved between ranks and rewound."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from moe.parallel import Ranks

JSON = None | bool | int | float | str | list[Any] | dict[str, Any]
"""What ``json`` writes and reads back unchanged (so no tuples, and the keys of a dict are strings)."""


@dataclass
class TrainingState:
    """Named tensors and scalars that together make the next step what it is.

    ``tensors`` are live, not copies, and have flat names, for example ``model.layers.1.moe.experts.w_up`` and
    ``optimizer.exp_avg.layers.1.moe.experts.w_up``; every rank has the same names. A plain tensor is identical on every
    rank. A ``torch.distributed.tensor.DTensor`` is sharded by rows (dimension 0), replicated, or both, each on a
    dimension of its mesh; ranks may hold uneven parts, and none at all.

    ``scalars`` are equal on every rank. Floats keep every bit when saved.
    """

    tensors: dict[str, torch.Tensor]
    scalars: Mapping[str, JSON] = field(default_factory=dict)


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a state's tensor that this rank holds, over the same storage."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_finite(state: TrainingState, ranks: Ranks) -> bool:
    """Whether no tensor of the state has NaN or infinity on any rank. Collective; the same on every rank."""
    parts = [local_tensor(tensor).isfinite().all() for tensor in state.tensors.values() if tensor.is_floating_point()]
    bad = (~torch.stack([part.to(ranks.device) for part in parts]).all()).double()
    return not float(ranks.max_over_world(bad))
