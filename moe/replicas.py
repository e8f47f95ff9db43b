"""Copies that should be equal: which parameters are not the same on all ranks that hold them, bit for bit.

Ranks that start alike and apply equal updates stay alike for ever, so a difference is a fault: of memory, of a kernel,
of a link. Nothing else shows it, since each rank goes on with a weight that is plausible.

Shape legend: N tensors that have copies, P expert-parallel ranks.
"""

import torch
from torch import nn

from moe.parameters import ParameterSet

_WORD = 8
_LEAST = torch.iinfo(torch.int64).min


class Replicas:
    """Compares the copies of parameters and buffers: dense ones over all ranks, experts over the ranks that hold them.

    Sharded parameters have no copies. Buffers that follow from the config are left out, and so is what the optimizer
    remembers: a difference there is one of the weights after the next update. The last bit of a weight may be right
    again by then, since an update rounds.
    """

    def __init__(self, model: nn.Module, parameters: ParameterSet, every_steps: int) -> None:
        """``every_steps``: steps between comparisons, 0 for none."""
        ranks = parameters.ranks
        self._ranks, self._every = ranks, every_steps
        whole: dict[str, torch.Tensor] = {}
        experts: dict[str, torch.Tensor] = {}
        if every_steps and ranks.world > 1:
            whole = {p.name: p.handle for p in parameters.all if p.placement == "replicated"}
            kept = model.state_dict().keys()
            whole |= {name: buffer for name, buffer in model.named_buffers() if name in kept}
            if ranks.replicas > 1:
                experts = {p.name: p.handle for p in parameters.all if p.placement == "experts"}
        self._whole, self._experts = whole, experts
        self.compared = (*whole, *experts)
        """Names of the tensors of which there are copies; none where nothing is to be compared."""

    def differing(self, step: int) -> tuple[str, ...]:
        """Names of tensors whose copies differ, the same on every rank; empty where ``step`` is not one to compare at.

        ``step``: optimizer steps done. Collective where it is: one reduction of 2 N (1 + P) numbers at most. On one
        process there is nothing to compare, and nothing is computed.
        """
        if not self.compared or step % self._every:
            return ()
        return tuple(name for name, differs in zip(self.compared, self._compare(), strict=True) if differs)

    @torch.no_grad()
    def _compare(self) -> list[bool]:
        sums_N = torch.stack([checksum(tensor) for tensor in (*self._whole.values(), *self._experts.values())])
        whole_N, experts_N = sums_N.split([len(self._whole), len(self._experts)])
        # Each expert-parallel rank has a row of its own; what others put there must not count.
        rows = self._ranks.ep if self._experts else 0
        largest_PN = experts_N.new_full((rows, len(experts_N)), _LEAST)
        least_PN = largest_PN.clone()
        if rows:
            largest_PN[self._ranks.ep_rank], least_PN[self._ranks.ep_rank] = experts_N, ~experts_N
        # ~x falls as x rises and, unlike -x, never overflows: one maximum finds both ends.
        ends = torch.cat((whole_N, largest_PN.flatten(), ~whole_N, least_PN.flatten()))
        largest, least = self._ranks.max_over_world(ends).chunk(2)
        differs = largest != ~least
        whole, of_experts = differs.split([len(whole_N), largest_PN.numel()])
        found: list[bool] = torch.cat((whole, of_experts.view(rows, len(experts_N)).any(dim=0))).tolist()
        return found


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor's bits, read as integers of 64 bits, modulo 2^64: a scalar, int64, on the tensor's device.

    Finds every change within one of the words, of one bit or of many. It misses changes of several words that cancel
    out, such as two values that have changed places: those of a broken loop rather than of broken memory. On a CPU it
    takes some 0.2 ms per million fp32 values.
    """
    flat = tensor.detach().reshape(-1)
    if flat.storage_offset() * flat.element_size() % _WORD:
        flat = flat.clone()
    if flat.nbytes % _WORD == 0:
        return flat.view(torch.int64).sum()
    octets = flat.view(torch.uint8)
    whole = flat.nbytes // _WORD * _WORD
    return octets[:whole].view(torch.int64).sum() + octets[whole:].sum(dtype=torch.int64)
