"""The one list of what makes the next step what it is: disk checkpoints, snapshots and replay all read it."""

from collections.abc import Mapping

import torch

from moe.model import Transformer
from moe.optim import Optimizer
from moe.parallel import Ranks
from moe.parameters import Parameter, ParameterSet
from moe.stability.detector import SpikeDetector
from moe.stability.technique import Technique
from moe.state import TrainingState


def _as_saved(parameter: Parameter, local: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """``local`` as every rank should see it: sharded placements as DTensors over the same storage."""
    if parameter.placement == "replicated" or ranks.mesh is None:
        return local
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if parameter.placement == "experts":
        return DTensor.from_local(local, ranks.mesh, (Replicate(), Shard(0)), run_check=False)
    handle = parameter.handle
    assert isinstance(handle, DTensor)
    return DTensor.from_local(
        local, handle.device_mesh, handle.placements, run_check=False, shape=handle.shape, stride=handle.stride()
    )


def collect_state(
    model: Transformer,
    parameters: ParameterSet,
    optimizer: Optimizer,
    techniques: Mapping[str, Technique],
    detector: SpikeDetector,
    ranks: Ranks,
    scalars: dict[str, int],
) -> TrainingState:
    """Live tensors of the weights, buffers (expert biases), moments, techniques and detector, by name."""
    # Buffers that follow from the config (tables of hash layers) are no state, and not in the state dict.
    kept = model.state_dict().keys()
    tensors: dict[str, torch.Tensor] = {f"model.{name}": b for name, b in model.named_buffers() if name in kept}
    for p in parameters.all:
        tensors[f"model.{p.name}"] = _as_saved(p, p.local, ranks)
        for moment, by_name in optimizer.moments().items():
            if p.name in by_name:
                tensors[f"optimizer.{moment}.{p.name}"] = _as_saved(p, by_name[p.name], ranks)
    for family, technique in techniques.items():
        tensors |= {f"stability.{family}.{name}": tensor for name, tensor in technique.state().items()}
    tensors |= {f"detector.{name}": tensor for name, tensor in detector.state().items()}
    return TrainingState(tensors, scalars)
