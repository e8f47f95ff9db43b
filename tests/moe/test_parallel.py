"""The groups of ranks."""

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from moe.config.trainer import ParallelConfig
from moe.parallel import join
from tests.distributed import run_distributed


def waits(rank: int, world: int) -> list[float]:
    """Seconds that a collective of each group waits for a peer that does not come."""
    ranks = join(ParallelConfig(workers=world, expert_parallel=2))
    groups = [dist.group.WORLD, ranks.ep_group, ranks.replica_group]

    def seconds(group: ProcessGroup | None) -> float:
        assert group is not None
        found: float = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
        return found

    return [seconds(group) for group in groups]


def test_every_group_gives_up_when_the_default_one_does() -> None:
    # torch gives groups of a mesh half an hour, in which nobody notices that a worker stalls within a layer.
    assert run_distributed(waits, 4, collective_timeout_s=17) == [[17, 17, 17]] * 4
