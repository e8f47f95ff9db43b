"""The residual stream: how it starts, how a sub-layer reads from it and adds to it, and how it ends.

A residual is a module that stands around one sub-layer: ``read, add = residual(x)``, then ``x = add(sub_layer(read))``.

Shape legend: B sequences, S positions, N streams, D model width. The stream is [B, S, D], with hyper-connections
[B, S, N, D].
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from moe.config.model import ModelConfig
from moe.config.residual import PlainResidualConfig, ResidualConfig
from moe.layers.hyper_connections import Collapse, HyperConnection


class PlainResidual(nn.Module):
    """``x + F(x)``."""

    def forward(self, x_BSD: torch.Tensor) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        """[B, S, D] -> what the sub-layer reads, and what adds its output."""
        return x_BSD, partial(torch.add, x_BSD)


def build_residual(config: ModelConfig, sub_layer: int) -> nn.Module:
    """The residual around a sub-layer, which counts from 0 through the model."""
    if isinstance(config.residual, PlainResidualConfig):
        return PlainResidual()
    return HyperConnection(config.residual, config.hidden_size, config.norm_eps, sub_layer)


def spread(x_BSD: torch.Tensor, config: ResidualConfig) -> torch.Tensor:
    """The stream that vectors [B, S, D] begin: themselves, or N copies (a view)."""
    if isinstance(config, PlainResidualConfig):
        return x_BSD
    return x_BSD.unsqueeze(2).expand(-1, -1, config.streams, -1)


def build_collapse(config: ModelConfig) -> nn.Module:
    """The end of the stream: whatever it is -> [B, S, D]."""
    if isinstance(config.residual, PlainResidualConfig):
        return nn.Identity()
    return Collapse(config.residual, config.hidden_size, config.norm_eps)
