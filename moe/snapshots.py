"""Snapshots of training state in memory: a few of the last steps, to go back to within a moment.

Each rank holds its own part of the state, so nothing is sent; what the ring needs is what the state takes, times the
number of snapshots. The copies are on the host: GPU memory is what training never has enough of.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch

from moe.state import JSON, TrainingState, local_tensor


@dataclass
class _Snapshot:
    step: int
    tensors: list[torch.Tensor]
    scalars: dict[str, JSON]


class SnapshotMemoryError(ValueError):
    """The snapshots do not fit into the memory that they were given."""


class SnapshotRing:
    """The newest ``number`` snapshots of a state; the memory of one that is dropped is used again."""

    def __init__(self, state: Callable[[], TrainingState], number: int, memory_bytes: float) -> None:
        """``state`` gives the live state, with the same tensors at every call.

        Raises:
            SnapshotMemoryError: so many snapshots of it take more than ``memory_bytes`` on this rank.
        """
        self._state = state
        self._number = number
        self._held: list[_Snapshot] = []
        size = sum(tensor.nbytes for tensor in self._tensors(state()))
        if number * size > memory_bytes:
            raise SnapshotMemoryError(
                f"{number} snapshots of {_in_gib(size)} GiB each take {_in_gib(number * size)} GiB of a worker's "
                f"memory, and {_in_gib(memory_bytes)} GiB is what they may take"
            )

    @property
    def steps(self) -> list[int]:
        """Steps done in each snapshot, the oldest first."""
        return [snapshot.step for snapshot in self._held]

    def take(self, step: int) -> None:
        """Copy the state, which is that after ``step``."""
        state = self._state()
        live = self._tensors(state)
        if len(self._held) == self._number:
            spare = self._held.pop(0).tensors
        else:
            spare = [torch.empty_like(t, device="cpu", pin_memory=t.is_cuda) for t in live]
        _copy(spare, live)
        self._held.append(_Snapshot(step, spare, copy.deepcopy(dict(state.scalars))))

    def restore(self, step: int) -> dict[str, JSON]:
        """Fill the live tensors from the snapshot of ``step`` and return its scalars; newer snapshots are dropped."""
        while self._held and self._held[-1].step > step:
            self._held.pop()
        if not self._held or self._held[-1].step != step:
            raise KeyError(f"there is no snapshot of step {step}")
        newest = self._held[-1]
        _copy(self._tensors(self._state()), newest.tensors)
        return copy.deepcopy(newest.scalars)

    def clear(self) -> None:
        """Drop all: the state is that of another timeline."""
        self._held.clear()

    @staticmethod
    def _tensors(state: TrainingState) -> list[torch.Tensor]:
        return [local_tensor(tensor) for tensor in state.tensors.values()]


@torch.no_grad()
def _copy(to: list[torch.Tensor], source: list[torch.Tensor]) -> None:
    torch._foreach_copy_(to, source)


def _in_gib(size: float) -> str:
    return f"{size / 2**30:.3g}"
