"""The transformer: embedding, blocks, head, and multi-token prediction.

Shape legend: B sequences, S positions, T = B*S tokens, L = S + 1 + MTP depth, D model width, V vocabulary,
K experts per token. The residual stream is x: [B, S, D], or [B, S, N, D] where ``model.residual`` has N streams.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from moe.batch import Batch
from moe.config.model import ModelConfig
from moe.layers.activation import build_activation
from moe.layers.attention import build_attention, within_documents
from moe.layers.ffn import FeedForward
from moe.layers.linear import Linear
from moe.layers.moe import MoeLayer
from moe.layers.norm import RMSNorm
from moe.layers.positions import Positions
from moe.layers.residual import build_collapse, build_residual, spread
from moe.layers.router import Routing
from moe.parallel import Ranks


@dataclass(frozen=True)
class ModelOutput:
    """Logits [B, S, V] in the compute dtype, for the next token and (with MTP) the one after; routing per MoE layer."""

    logits: torch.Tensor
    mtp_logits: torch.Tensor | None
    routings: list[Routing]


class Block(nn.Module):
    """Attention and feed-forward, dense or MoE by the layer's number, with norms before, after or on both sides."""

    def __init__(self, config: ModelConfig, layer: int, ranks: Ranks) -> None:
        super().__init__()

        def norm(stands: bool) -> nn.Module:
            return RMSNorm(config.hidden_size, config.norm_eps) if stands else nn.Identity()

        before, after = config.norm_placement != "reordered", config.norm_placement != "pre"
        self.attention_residual, self.ffn_residual = (build_residual(config, 2 * layer + i) for i in range(2))
        self.attention_norm, self.attention_post_norm = norm(before), norm(after)
        self.attention = build_attention(config)
        self.ffn_norm, self.ffn_post_norm = norm(before), norm(after)
        self.ffn: FeedForward | MoeLayer
        if config.is_moe_layer(layer):
            self.ffn = MoeLayer(config, ranks, layer if config.is_hash_layer(layer) else None)
        else:
            activation = build_activation(config.activation)
            self.ffn = FeedForward(config.hidden_size, config.intermediate_size, activation)

    def forward(
        self,
        x: torch.Tensor,
        positions: Positions,
        chosen_TK: torch.Tensor | None = None,
        *,
        route_only: bool = False,
    ) -> tuple[torch.Tensor, Routing | None]:
        """The residual stream -> the same shape, and the routing if this layer has experts.

        ``chosen_TK`` are expert ids to take instead of choosing. With ``route_only`` the experts add nothing.
        """
        read_BSD, add = self.attention_residual(x)
        x = add(self.attention_post_norm(self.attention(self.attention_norm(read_BSD), positions.mask_B1SS)))
        read_BSD, add = self.ffn_residual(x)
        normed_BSD = self.ffn_norm(read_BSD)
        if isinstance(self.ffn, MoeLayer):
            y_BSD, routing = self.ffn(normed_BSD, positions, chosen_TK, route_only=route_only)
            return add(self.ffn_post_norm(y_BSD)), routing
        return add(self.ffn_post_norm(self.ffn(normed_BSD))), None


class MtpBlock(nn.Module):
    """Predicts the token after the next from the trunk's state and the next token (DeepSeek-V3, section 2.2).

    Embedding and head are the trunk's; the rest is its own. Of several streams each is joined with the next token by
    itself, and the block's own weights collapse them (as public ports of DeepSeek-V4's inference code do).
    """

    def __init__(self, config: ModelConfig, ranks: Ranks) -> None:
        super().__init__()
        self.residual = config.residual
        self.hidden_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.embed_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.project = Linear(2 * config.hidden_size, config.hidden_size)
        self.block = Block(config, config.num_layers, ranks)
        self.collapse = build_collapse(config)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(
        self,
        x: torch.Tensor,
        next_embedding_BSD: torch.Tensor,
        positions: Positions,
        chosen_TK: torch.Tensor | None = None,
        *,
        route_only: bool = False,
    ) -> tuple[torch.Tensor, Routing | None]:
        """Residual stream at the trunk's end and the next token's embedding -> normalised state, routing."""
        ahead = spread(self.embed_norm(next_embedding_BSD), self.residual)
        x = self.project(torch.cat((self.hidden_norm(x), ahead), dim=-1))
        x, routing = self.block(x, positions, chosen_TK, route_only=route_only)
        return self.norm(self.collapse(x)), routing


class Transformer(nn.Module):
    """The whole model; ``config.vocab_size`` must be set. Build it on the meta device to count without memory."""

    def __init__(self, config: ModelConfig, ranks: Ranks, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("model.vocab_size must be set before the model is built")
        self.config = config
        self.compute_dtype = dtype
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer, ranks) for layer in range(config.num_layers))
        self.collapse = build_collapse(config)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = Linear(config.hidden_size, config.vocab_size)
        self.mtp = MtpBlock(config, ranks) if config.mtp.depth else None

    def forward(self, batch: Batch, chosen: Sequence[torch.Tensor] | None = None) -> ModelOutput:
        """Predict every position of ``batch``, whose ids are [B, S + 1 + MTP depth].

        ``chosen`` are expert ids [T, K] for every MoE layer, to take instead of choosing.
        """
        x, y_BSD, routings = self._states(batch, chosen)
        mtp_logits = None if y_BSD is None else self.head(y_BSD)
        return ModelOutput(self.head(self.norm(self.collapse(x))), mtp_logits, routings)

    @torch.no_grad()
    def choose(self, batch: Batch) -> list[torch.Tensor]:
        """Expert ids [T, K] that every MoE layer chooses for ``batch``: a forward that ends at the last router.

        Without gradients. Every rank of an expert-parallel group must call it.
        """
        return [routing.ids_TK for routing in self._states(batch, None, up_to_routers=True)[2]]

    def _states(
        self, batch: Batch, chosen: Sequence[torch.Tensor] | None, *, up_to_routers: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None, list[Routing]]:
        """The trunk's residual stream, the MTP block's state after its norm, and the routings.

        With ``up_to_routers`` only the routings are whole: the last MoE layer runs no expert.
        """
        depth = self.config.mtp.depth if self.mtp is not None else 0
        length = batch.ids_BL.shape[1] - 1 - depth
        positions = Positions(
            batch.ids_BL[:, :length],
            None if batch.real_BL is None else batch.real_BL[:, :length],
            None if batch.documents_BL is None else within_documents(batch.documents_BL[:, :length]),
            None if batch.domains_BL is None else batch.domains_BL[:, :length],
        )
        choices = _choices(chosen)
        embedded_BLD = self.embed(batch.ids_BL[:, : length + depth]).to(self.compute_dtype)
        x = spread(embedded_BLD[:, :length], self.config.residual)
        routings: list[Routing] = []
        last = len(self.layers) - 1 + depth  # MoE layers are the last ones
        for block, layer in enumerate(self.layers):
            chosen_TK = next(choices) if self.config.is_moe_layer(block) else None
            x, routing = layer(x, positions, chosen_TK, route_only=up_to_routers and block == last)
            if routing is not None:
                routings.append(routing)
        y_BSD = None
        if self.mtp is not None:
            # It reads the next token as well, so a position counts as real only if that is. A position keeps the
            # document of its own token: with the next token's, the first document's last state would be a key for the
            # second.
            if batch.real_BL is not None:
                real_ahead = batch.real_BL[:, :length] & batch.real_BL[:, 1 : length + 1]
                positions = replace(positions, real_BS=real_ahead)
            y_BSD, routing = self.mtp(x, embedded_BLD[:, 1:], positions, next(choices), route_only=up_to_routers)
            if routing is not None:
                routings.append(routing)
        return x, y_BSD, routings

    def blocks(self) -> list[Block]:
        """Every block in order, the MTP block's last."""
        blocks = [*self.layers, *([self.mtp.block] if self.mtp is not None else [])]
        return [block for block in blocks if isinstance(block, Block)]

    def moe_layers(self) -> list[MoeLayer]:
        """Every layer with experts, in the order of ``ModelOutput.routings`` (the MTP block's last)."""
        return [block.ffn for block in self.blocks() if isinstance(block.ffn, MoeLayer)]


def _choices(chosen: Sequence[torch.Tensor] | None) -> Iterator[torch.Tensor | None]:
    """What each MoE layer in turn is to take; nothing beyond the last."""
    yield from chosen or ()
    while True:
        yield None
