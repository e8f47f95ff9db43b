"""Ranks and their groups: world = replicas x expert-parallel ranks.

Rank r is expert-parallel rank ``r % ep`` of replica ``r // ep``: the ranks of one expert-parallel group are
neighbours, so that its all-to-all stays inside a node where it can. Every rank reads its own share of each batch;
a rank of a group holds the experts ``[ep_rank * E/ep, (ep_rank + 1) * E/ep)`` of each MoE layer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moe.config.trainer import ParallelConfig


@dataclass
class WireCount:
    """Bytes that this rank sent to other ranks for expert parallelism, counted at the collective call.

    ``payload`` is token vectors and their gradients; ``metadata`` is row counts, expert ids, gates and gate gradients.
    """

    payload: int = 0
    metadata: int = 0

    def clear(self) -> None:
        """Start counting from zero."""
        self.payload = self.metadata = 0

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """What is sent inside, by a forward that is not training's, does not count."""
        sent = (self.payload, self.metadata)
        try:
            yield
        finally:
            self.payload, self.metadata = sent


@dataclass(frozen=True)
class Ranks:
    """This process's place among the ranks. ``mesh`` is None for a single process without a process group."""

    device: torch.device
    rank: int = 0
    world: int = 1
    ep: int = 1
    mesh: DeviceMesh | None = None
    wire: WireCount = field(default_factory=WireCount)

    @property
    def ep_rank(self) -> int:
        """Which slice of the experts this rank holds."""
        return self.rank % self.ep

    @property
    def replicas(self) -> int:
        """Copies of every expert."""
        return self.world // self.ep

    @property
    def ep_group(self) -> dist.ProcessGroup | None:
        """The ranks that together hold all experts once."""
        return self.mesh.get_group("ep") if self.mesh is not None else None

    @property
    def replica_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold the same experts as this one."""
        return self.mesh.get_group("replica") if self.mesh is not None else None

    def sum_over_world(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum ``tensor`` over all ranks, in place."""
        return self._reduce(tensor, None, self.world)

    def max_over_world(self, tensor: torch.Tensor) -> torch.Tensor:
        """Elementwise maximum of ``tensor`` over all ranks, in place."""
        return self._reduce(tensor, None, self.world, dist.ReduceOp.MAX)

    def sum_over_experts(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum ``tensor`` over the expert-parallel group, in place."""
        return self._reduce(tensor, self.ep_group, self.ep)

    def sum_over_replicas(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum ``tensor`` over the ranks that hold the same experts, in place."""
        return self._reduce(tensor, self.replica_group, self.replicas)

    @staticmethod
    def _reduce(
        tensor: torch.Tensor,
        group: dist.ProcessGroup | None,
        size: int,
        op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
    ) -> torch.Tensor:
        if size > 1:
            dist.all_reduce(tensor, op=op, group=group)
        return tensor


def choose_device(config: ParallelConfig) -> torch.device:
    """The device that ``parallel.device`` names, this process's current GPU for cuda.

    Raises:
        ValueError: ``parallel.device`` is cuda and there is none.
    """
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ValueError("parallel.device is cuda, but torch finds no CUDA device; set parallel.device=cpu")
    if config.device == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def join(config: ParallelConfig, device: torch.device | None = None) -> Ranks:
    """Take this process's place in the default process group (or alone, if there is none).

    Raises:
        ValueError: the process group's size is not ``parallel.workers``.
    """
    device = device or choose_device(config)
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world != config.workers:
        raise ValueError(f"parallel.workers is {config.workers}, but the process group has {world} ranks")
    if world == 1:
        return Ranks(device)
    mesh = init_device_mesh(
        device.type, (world // config.expert_parallel, config.expert_parallel), mesh_dim_names=("replica", "ep")
    )
    _share_timeout(mesh, device)
    return Ranks(device, dist.get_rank(), world, config.expert_parallel, mesh)


def _share_timeout(mesh: DeviceMesh, device: torch.device) -> None:
    """Give every group the timeout of the default one; torch gives new ones its own, half an hour for gloo."""
    # Public functions take a timeout for groups that one makes oneself, and the mesh makes its own.
    from torch.distributed.distributed_c10d import _get_default_group, _set_pg_timeout

    timeout = _get_default_group()._get_backend(device).options._timeout
    for group in mesh.get_all_groups():
        _set_pg_timeout(timeout, group)
