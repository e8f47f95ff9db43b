"""What the trainer is fed with.

Shape legend: B sequences, S tokens per sequence, L = S + 1 + MTP depth.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank.

    ``ids_BL`` holds token ids, int64. Positions ``[:, :S]`` are inputs and ``[:, 1:S+1]`` their targets; what lies
    beyond is read by multi-token prediction alone. ``real_BL`` (bool) is False where a position is padding; None
    says that there is no padding. Padding counts neither as load nor as loss.
    """

    ids_BL: torch.Tensor
    real_BL: torch.Tensor | None = None


# The micro-batches of this rank at an optimizer step (from 0): a pure function of the step.
BatchSource = Callable[[int], Sequence[Batch]]
