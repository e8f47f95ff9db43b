"""What one rank finds out for all of them."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from moe.parallel import Ranks
from pipelines.errors import UserError

T = TypeVar("T")


def from_first_rank(ranks: Ranks, find: Callable[[], T]) -> T:
    """What ``find`` returns on rank 0, where alone it is called; of plain values and paths. Collective.

    Raises:
        UserError: ``find`` has raised it; on every rank.
    """
    if ranks.world == 1:
        return find()
    found: list[Any] = [None, None]
    if ranks.rank == 0:
        try:
            found[0] = find()
        except UserError as error:
            found[1] = str(error)
    dist.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise UserError(found[1])
    result: T = found[0]
    return result
