"""SwiGLU feed-forward layer (arXiv 2002.05202): dense layers and shared experts."""

import torch
from torch import nn

from moe.layers.activation import SwiGLUActivation
from moe.layers.linear import Linear


class SwiGLU(nn.Module):
    """``W_down (silu(W_gate x) * W_up x)``; ``gate_up.weight`` stacks W_gate over W_up, [2F, D]."""

    def __init__(self, hidden_size: int, ffn_size: int) -> None:
        super().__init__()
        self.gate_up = Linear(hidden_size, 2 * ffn_size)
        self.down = Linear(ffn_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]."""
        y: torch.Tensor = self.down(SwiGLUActivation.apply(self.gate_up(x)))
        return y
