"""Dense parameters sharded over all ranks with FSDP2; experts stay where expert parallelism put them."""

from typing import TYPE_CHECKING, cast

from moe.model import Transformer
from moe.parallel import Ranks

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def shard_dense_parameters(model: Transformer, ranks: Ranks) -> None:
    """Shard every dense parameter of ``model`` over the world, block by block, in place. Collective.

    Gradients are summed, not averaged: the loss is already divided by what the global batch holds.
    """
    if ranks.world == 1 or ranks.mesh is None:
        return
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = ranks.mesh._flatten("world")
    experts = {parameter for name, parameter in model.named_parameters() if ".experts." in name}
    blocks = [*model.layers, *([model.mtp.block] if model.mtp is not None else [])]
    for module in (*blocks, model):
        sharded = fully_shard(module, mesh=mesh, ignored_params=experts)
        sharded.set_gradient_divide_factor(1.0)
        # Asks for plain sums: FSDP would ask for a factor of 1 by an operation that gloo does not have.
        sharded.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "choose")


def sync_gradients(model: Transformer, sync: bool) -> None:
    """Whether the next backward reduces sharded gradients; only the last micro-batch of a step should."""
    if _is_sharded(model):
        cast("FSDPModule", model).set_requires_gradient_sync(sync)


def release_gathered(model: Transformer) -> None:
    """Forget the whole parameters that a forward without backward leaves gathered in the root module.

    The next forward would use them as they are, although the shards may have been restored from a saved state since.
    """
    if _is_sharded(model):
        cast("FSDPModule", model).reshard()


def _is_sharded(model: Transformer) -> bool:
    return hasattr(model, "reshard")
