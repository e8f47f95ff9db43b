"""Units: the tensors that have statistics of their own, which are every parameter and each expert's slice.

Experts are kept stacked, but each is a matrix of its own: one that got a spike, or no token at all, must not move the
statistics of its neighbours. Statistics cover the whole tensor, whatever holds it, and are equal on every rank.

Shape legend: U units (parameters in the model's order; where a parameter holds experts, one per expert in the order of
their ids over all ranks, so that U and the order are the same for every division of the ranks), N elements of a unit on
this rank, L units of one parameter on this rank.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch

from moe.parallel import Ranks
from moe.parameters import Parameter


class Units:
    """The units of ``parameters``. Every method that returns [U] is collective: one all-reduce for all units."""

    def __init__(self, parameters: Sequence[Parameter], ranks: Ranks) -> None:
        self.ranks = ranks
        self._held = [p.local.shape[0] if p.placement == "experts" else 1 for p in parameters]
        self._places: list[slice] = []
        sizes: list[float] = []
        once: list[bool] = []
        for p, held in zip(parameters, self._held, strict=True):
            is_expert = p.placement == "experts"
            first = len(sizes) + (ranks.ep_rank * held if is_expert else 0)
            self._places.append(slice(first, first + held))
            sizes += [p.handle.numel() / held] * (held * ranks.ep if is_expert else 1)
            # Every element once: a replicated tensor on the first rank, an expert in the first replica.
            counted = {"replicated": ranks.rank == 0, "sharded": True, "experts": ranks.rank < ranks.ep}[p.placement]
            once += [counted] * held
        device = ranks.device
        self.sizes_U = torch.tensor(sizes, dtype=torch.float64, device=device)
        """Elements of each whole unit, fp64 [U]."""
        self._index = torch.cat([torch.arange(place.start, place.stop) for place in self._places]).to(device)
        self._once = torch.tensor(once, device=device)

    def __len__(self) -> int:
        return len(self.sizes_U)

    def sums(self, tensors: Iterable[torch.Tensor]) -> torch.Tensor:
        """Sum over each unit's elements, fp64 [U]; ``tensors`` are one local tensor per parameter, in order."""
        return self._add([rows_LN.sum(dim=1) for rows_LN in self._rows(tensors)])

    def norms(self, tensors: Iterable[torch.Tensor]) -> torch.Tensor:
        """L2 norm of each unit, fp64 [U]; ``tensors`` are one local tensor per parameter, in order."""
        norms = [torch.linalg.vector_norm(rows_LN, dim=1) for rows_LN in self._rows(tensors)]
        return self._add([norm_L.double().square() for norm_L in norms]).sqrt()

    def maxima(self, tensors: Iterable[torch.Tensor]) -> torch.Tensor:
        """Largest absolute element of each unit, fp64 [U]; ``tensors`` are one local tensor per parameter, in order."""
        maxima = [
            # A rank may hold nothing of a sharded tensor.
            rows_LN.abs().amax(dim=1) if rows_LN.numel() else rows_LN.new_zeros(rows_LN.shape[0])
            for rows_LN in self._rows(tensors)
        ]
        local_U = torch.zeros_like(self.sizes_U)
        local_U[self._index] = torch.cat(maxima).double()
        return self.ranks.max_over_world(local_U)

    def shares(self, values_U: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """For each local tensor the values of its units, in its dtype and of a shape that broadcasts over it."""
        return [
            values_U[place].to(tensor.dtype).view(-1, *[1] * (tensor.dim() - 1))
            if held > 1
            else values_U[place.start].to(tensor.dtype)
            for place, held, tensor in zip(self._places, self._held, tensors, strict=True)
        ]

    def _rows(self, tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """One after the other, so that whoever makes them need not keep them all."""
        return (tensor.reshape(held, -1) for held, tensor in zip(self._held, tensors, strict=True))

    def _add(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        local_U = torch.zeros_like(self.sizes_U)
        local_U[self._index[self._once]] = torch.cat(list(parts)).double()[self._once]
        return self.ranks.sum_over_world(local_U)
