"""The MoE layer: router, dispatch, routed experts and shared experts.

Shape legend: B sequences, S positions, T = B*S tokens, D model width, K experts per token.
"""

import torch
from torch import nn

from moe.config.model import ModelConfig
from moe.layers.activation import build_activation
from moe.layers.dispatch import RowCodec, dispatch_combine
from moe.layers.experts import Experts
from moe.layers.ffn import FeedForward
from moe.layers.norm import RMSNorm
from moe.layers.positions import Positions
from moe.layers.router import Router, Routing
from moe.parallel import Ranks


class MoeLayer(nn.Module):
    """Each token passes its top-k routed experts, weighted, and all shared experts. No token is dropped."""

    def __init__(self, config: ModelConfig, ranks: Ranks) -> None:
        super().__init__()
        c = config.moe
        self.ranks = ranks
        self.row_codec: RowCodec | None = None
        self.router = Router(config.hidden_size, c)
        activation = build_activation(config.activation)
        self.experts = Experts(c.num_experts // ranks.ep, config.hidden_size, c.expert_size, activation)
        self.output_norm = RMSNorm(config.hidden_size, config.norm_eps) if c.output_norm else nn.Identity()
        # Shared experts all see the same token with weight 1, so n of them are one FFN of n times the width.
        shared_size = c.num_shared_experts * c.expert_size
        self.shared = FeedForward(config.hidden_size, shared_size, activation) if shared_size else None

    def forward(
        self, x_BSD: torch.Tensor, positions: Positions, chosen_TK: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Routing]:
        """[B, S, D] -> the layer's output and its routing; padding is routed like any token but not counted.

        ``chosen_TK`` are expert ids to take instead of choosing.
        """
        x_TD = x_BSD.flatten(0, 1)
        real_T = None if positions.real_BS is None else positions.real_BS.flatten()
        routing = self.router(x_TD, real_T, chosen_TK)
        y_TD = dispatch_combine(
            x_TD, routing.ids_TK, routing.gates_TK, self.experts.num_experts, self.experts, self.ranks, self.row_codec
        )
        # After the combine: every rank norms whole sums, however the experts are divided.
        y_TD = self.output_norm(y_TD)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        return y_TD.view_as(x_BSD), routing
