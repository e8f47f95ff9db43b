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
from moe.layers.hash_routing import HashChoice
from moe.layers.norm import RMSNorm
from moe.layers.positions import Positions
from moe.layers.router import Router, Routing
from moe.layers.selection import identity_sum, real_choices
from moe.parallel import Ranks


class MoeLayer(nn.Module):
    """Each token passes the routed experts that it chose, weighted, and all shared experts. No token is dropped.

    Identity experts are routed experts too: their share is part of the sum that ``output_norm`` norms.
    """

    def __init__(self, config: ModelConfig, ranks: Ranks, hash_layer: int | None = None) -> None:
        """``hash_layer``: the number of the block if its experts are looked up by token id, None if they are chosen."""
        super().__init__()
        c = config.moe
        self.ranks = ranks
        self.hash_choice: HashChoice | None = None
        if hash_layer is not None:
            assert config.vocab_size is not None
            self.hash_choice = HashChoice(config.vocab_size, c.num_experts, c.top_k, hash_layer)
        self.row_codec: RowCodec | None = None
        self.router = Router(config.hidden_size, c)
        activation = build_activation(config.activation)
        self.experts = Experts(c.num_experts // ranks.ep, config.hidden_size, c.expert_size, activation)
        self.output_norm = RMSNorm(config.hidden_size, config.norm_eps) if c.output_norm else nn.Identity()
        # Shared experts all see the same token with weight 1, so n of them are one FFN of n times the width.
        shared_size = c.num_shared_experts * c.expert_size
        self.shared = FeedForward(config.hidden_size, shared_size, activation) if shared_size else None

    def forward(
        self,
        x_BSD: torch.Tensor,
        positions: Positions,
        chosen_TK: torch.Tensor | None = None,
        *,
        route_only: bool = False,
    ) -> tuple[torch.Tensor, Routing]:
        """[B, S, D] -> the layer's output and its routing; padding is routed like any token but not counted.

        ``chosen_TK`` are expert ids to take instead of choosing. With ``route_only`` no expert runs; the output is 0.
        """
        x_TD = x_BSD.flatten(0, 1)
        real_T = None if positions.real_BS is None else positions.real_BS.flatten()
        domains_T = None if positions.domains_BS is None else positions.domains_BS.flatten()
        if chosen_TK is None and self.hash_choice is not None:
            chosen_TK = self.hash_choice(positions.ids_BS.flatten())
        routing = self.router(x_TD, real_T, chosen_TK, domains_T)
        if route_only:
            return torch.zeros_like(x_BSD), routing
        c = self.router.config
        y_TD = dispatch_combine(
            x_TD,
            real_choices(routing.ids_TK, c),
            routing.gates_TK,
            self.experts.num_experts,
            self.experts,
            self.ranks,
            self.row_codec,
        )
        if c.num_identity_experts:
            # Here, on the token's own rank: what computes nothing need not travel.
            y_TD = y_TD + identity_sum(x_TD, routing.ids_TK, routing.gates_TK, c)
        # After the combine: every rank norms whole sums, however the experts are divided.
        y_TD = self.output_norm(y_TD)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        return y_TD.view_as(x_BSD), routing
