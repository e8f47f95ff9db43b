"""Every parameter of a rank with its role and placement; gradients are reduced, measured and scaled here.

Losses are sums divided by what the GLOBAL batch holds, so a gradient over all data is the SUM of the ranks' gradients,
for every placement:

- replicated: every rank holds it whole; summed over the world.
- sharded (FSDP2): every rank holds a slice; FSDP sums over the world during backward.
- experts: the ranks of an expert-parallel group hold different experts, each of which has already seen the tokens of
  its whole group through the dispatch; summed over the replicas alone. (Dividing by the group's size, or summing over
  the world, is the classical mistake; Adam hides it in the loss, the norm and the clip do not.)
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from moe.parallel import Ranks

Placement = Literal["replicated", "sharded", "experts"]
Group = Literal["dense", "router", "experts"]

# Gradients travel in flat buffers of about this size: one collective per tensor would pay its latency hundreds of
# times, one for all would double the memory of the gradients.
_BUCKET_BYTES = 64 << 20


@dataclass(frozen=True)
class Parameter:
    """One parameter as this rank sees it."""

    name: str
    handle: nn.Parameter
    placement: Placement
    group: Group

    @property
    def local(self) -> torch.Tensor:
        """What this rank holds of it; shares storage with the parameter."""
        return _local(self.handle.detach())

    @property
    def gradient(self) -> torch.Tensor:
        """What this rank holds of its gradient; zeros appear where backward left none."""
        if self.handle.grad is None:
            self.handle.grad = torch.zeros_like(self.handle)
        return _local(self.handle.grad)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The local shard of a DTensor; a plain tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _group_of(name: str) -> Group:
    if ".experts." in name:
        return "experts"
    return "router" if ".router." in name else "dense"


def _buckets(tensors: Iterable[torch.Tensor]) -> Iterable[list[torch.Tensor]]:
    bucket: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        bucket.append(tensor)
        size += tensor.numel() * tensor.element_size()
        if size >= _BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


class ParameterSet:
    """All parameters of the model on this rank, in a fixed order."""

    def __init__(self, model: nn.Module, ranks: Ranks, *, dense_is_sharded: bool) -> None:
        self.ranks = ranks
        dense: Placement = "sharded" if dense_is_sharded and ranks.world > 1 else "replicated"
        self.all = [
            Parameter(name, handle, "experts" if _group_of(name) == "experts" else dense, _group_of(name))
            for name, handle in model.named_parameters()
        ]

    def clear_gradients(self) -> None:
        """Forget all gradients."""
        for parameter in self.all:
            parameter.handle.grad = None

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Sum gradients over the ranks that hold the same parameter, in place (FSDP has done its own already)."""
        if self.ranks.world > 1:
            self._sum_in_buckets([p.gradient for p in self.all if p.placement == "replicated"], over_replicas=False)
        if self.ranks.replicas > 1:
            self._sum_in_buckets([p.gradient for p in self.all if p.placement == "experts"], over_replicas=True)

    def _sum_in_buckets(self, gradients: Sequence[torch.Tensor], *, over_replicas: bool) -> None:
        reduce = self.ranks.sum_over_replicas if over_replicas else self.ranks.sum_over_world
        for bucket in _buckets(gradients):
            flat = reduce(torch.cat([g.flatten() for g in bucket]))
            parts = flat.split([g.numel() for g in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    @torch.no_grad()
    def norms(self, tensors: Sequence[torch.Tensor] | None = None) -> dict[str, float]:
        """L2 norm over all ranks of each group ("dense", "router", "experts") and of everything ("total").

        ``tensors`` are one local tensor per parameter, in order; by default the gradients. Every value is counted once:
        replicated tensors on one rank, experts over one expert-parallel group, shards over the world.
        """
        tensors = [p.gradient for p in self.all] if tensors is None else tensors
        squares = torch.stack(torch._foreach_norm(list(tensors))).double().square()
        return self._norms_from(squares)

    def _norms_from(self, squares: torch.Tensor) -> dict[str, float]:
        groups: tuple[Group, ...] = ("dense", "router", "experts")
        placements: tuple[Placement, ...] = ("replicated", "sharded", "experts")
        cell = torch.tensor(
            [placements.index(p.placement) * len(groups) + groups.index(p.group) for p in self.all],
            device=squares.device,
        )
        sums = squares.new_zeros(len(placements) * len(groups)).index_add_(0, cell, squares).view(len(placements), -1)
        replicated, sharded, experts = sums.unbind()
        if any(p.placement == "sharded" for p in self.all):
            sharded = self.ranks.sum_over_world(sharded.clone())
        experts = self.ranks.sum_over_experts(experts.clone())
        by_group = (replicated + sharded + experts).tolist()
        return {**{g: s**0.5 for g, s in zip(groups, by_group, strict=True)}, "total": sum(by_group) ** 0.5}

    @torch.no_grad()
    def router_unit_sums(self) -> torch.Tensor:
        """Sum of each MoE layer's expert vectors, each scaled to length 1: [M, D]. Collective if dense is sharded."""
        routers = [p for p in self.all if p.group == "router"]
        # A shard holds whole rows, so whole expert vectors.
        sums_MD = torch.stack([F.normalize(p.local, dim=1).sum(dim=0) for p in routers])
        return self.ranks.sum_over_world(sums_MD) if routers[0].placement == "sharded" else sums_MD

    @torch.no_grad()
    def scale_gradients(self, factor: float, group: Group | None = None) -> None:
        """Multiply every gradient, or those of one group, by ``factor``, in place."""
        torch._foreach_mul_([p.gradient for p in self.all if group in (None, p.group)], factor)
