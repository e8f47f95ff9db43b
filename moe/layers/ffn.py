"""Gated feed-forward layer (arXiv 2002.05202): dense layers and shared experts."""

import torch
from torch import nn

from moe.layers.activation import Activate, Activation
from moe.layers.linear import Linear


class FeedForward(nn.Module):
    """``W_down act(W_gate x, W_up x)``; ``gate_up.weight`` stacks W_gate over W_up, [2F, D]."""

    def __init__(self, hidden_size: int, ffn_size: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.gate_up = Linear(hidden_size, 2 * ffn_size)
        self.down = Linear(ffn_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]."""
        y: torch.Tensor = self.down(Activate.apply(self.gate_up(x), self.activation))
        return y
