"""What layers know of a position besides its vector.

Shape legend: B sequences, S positions.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Positions:
    """The positions of one micro-batch."""

    ids_BS: torch.Tensor
    """The token that stands there, int64."""
    real_BS: torch.Tensor | None = None
    """False where it is padding, bool; None says that there is no padding."""
    mask_B1SS: torch.Tensor | None = None
    """Which positions may attend to which, bool; None is causal."""
    domains_BS: torch.Tensor | None = None
    """Class of the document that it belongs to, int64; None says that all are of class 0."""
