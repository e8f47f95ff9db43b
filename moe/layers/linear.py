"""Matrix product with fp32 weights in the dtype of its input."""

import torch
import torch.nn.functional as F
from torch import nn


class Linear(nn.Module):
    """``y = x W^T`` without offset, computed in the dtype of ``x``; ``weight`` [out, in] stays fp32."""

    def __init__(self, in_size: int, out_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_size, in_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out]."""
        return F.linear(x, self.weight.to(x.dtype))
