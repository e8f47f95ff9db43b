"""What an optimizer is to the trainer, to the registry of state and to techniques."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch


class Optimizer(ABC):
    """Updates the local tensors of the parameters that it was built with, from their gradients.

    Its state lives in plain dictionaries by parameter name: it is saved, resharded and rewound like any other tensor.
    """

    taken: int = 0
    """Updates made since the moments were 0."""

    @abstractmethod
    def step(self, lr: float) -> dict[str, float]:
        """One update with learning rate ``lr``; returns figures to report. May be collective.

        A parameter without gradient has one of zeros: its moments fade and its weights decay like all others.
        """

    @abstractmethod
    def moments(self) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """Live local tensors by name of the moment, then of the parameter; each like its parameter in shape."""

    @torch.no_grad()
    def reset(self) -> None:
        """Forget all moments and begin their correction anew, as before the first update."""
        for by_name in self.moments().values():
            torch._foreach_zero_(list(by_name.values()))
        self.restore(0)

    def restore(self, taken: int) -> None:
        """Continue ``taken`` updates after moments of 0 (the moments are filled in place by whoever restores them)."""
        self.taken = taken
