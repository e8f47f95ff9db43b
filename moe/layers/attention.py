"""Causal self-attention: multi-head latent attention (arXiv 2405.04434, section 2.1) and plain multi-head.

Shape legend: B sequences, S positions, D model width, H heads, N query-key width without position, R rotary width,
V value width per head, C key-value latent width.
"""

import math
from typing import assert_never

import torch
import torch.nn.functional as F
from torch import nn

from moe.config.model import MhaConfig, MlaConfig, ModelConfig
from moe.layers.linear import Linear
from moe.layers.norm import RMSNorm
from moe.layers.rotary import rotary_turns, rotate


def within_documents(documents_BS: torch.Tensor) -> torch.Tensor:
    """Which positions may attend to which: bool [B, 1, S, S], earlier ones (and itself) of the same document.

    Rotary positions go on counting over the sequence: their products depend on distances alone, which are the same
    inside a document wherever it begins. With a mask the kernel computes the upper half as well: on a CPU 5 % of a step
    at 256 positions (preset tiny) and 2 % at 512 (small).
    """
    positions = torch.arange(documents_BS.shape[1], device=documents_BS.device)
    same_BSS = documents_BS.unsqueeze(2) == documents_BS.unsqueeze(1)
    return (same_BSS & (positions.unsqueeze(1) >= positions)).unsqueeze(1)


class SoftmaxAttention(nn.Module):
    """Softmax attention over queries, keys and values as they are. A module, so that a hook sees what it reads."""

    def forward(
        self, q_BHSK: torch.Tensor, k_BHSK: torch.Tensor, v_BHSV: torch.Tensor, mask_B1SS: torch.Tensor | None
    ) -> torch.Tensor:
        """Causal or as ``mask_B1SS`` allows -> [B, S, H*V].

        The fused CPU kernel wants equal widths; a narrower value is padded with zeros, which the product ignores,
        because the unfused path writes the whole S x S matrix of every head.
        """
        width = v_BHSV.shape[-1]
        if v_BHSV.device.type == "cpu" and width < q_BHSK.shape[-1]:
            v_BHSV = F.pad(v_BHSV, (0, q_BHSK.shape[-1] - width))
        scale = q_BHSK.shape[-1] ** -0.5
        y_BHSV = F.scaled_dot_product_attention(
            q_BHSK, k_BHSK, v_BHSV, attn_mask=mask_B1SS, is_causal=mask_B1SS is None, scale=scale
        )
        return y_BHSV[..., :width].transpose(1, 2).flatten(2)


def _head_norms(width: int, config: ModelConfig) -> tuple[nn.Module, nn.Module]:
    """The norms of query heads and key heads; identities without ``qk_norm``."""
    if not config.attention.qk_norm:
        return nn.Identity(), nn.Identity()
    return RMSNorm(width, config.norm_eps), RMSNorm(width, config.norm_eps)


class LatentAttention(nn.Module):
    """Multi-head latent attention: keys and values are expanded from a narrow, normalised latent.

    Only R dimensions of each query and one shared key carry rotary position.

    With ``qk_norm`` each whole query head and each whole key head (its own part joined with the shared part) is normed
    before rotary position, which changes no length: a logit is then at most sqrt(N + R) times the largest product of
    gains. DeepSeek-V4 norms the query heads and the key-value entry, which there is itself the key of every head; here
    the latent is normed in any case, and the products with ``kv_up`` that make keys of it are what can still grow.
    (The price: keys are no longer linear in the latent, so a decoder must keep keys, not latents alone.)
    """

    def __init__(self, config: ModelConfig, attention: MlaConfig) -> None:
        super().__init__()
        self.config = attention
        self.rope_theta = config.rope_theta
        hidden, heads = config.hidden_size, attention.num_heads
        qk_width = attention.qk_nope_head_dim + attention.qk_rope_head_dim
        if attention.q_lora_rank is None:
            self.q_proj: nn.Module = Linear(hidden, heads * qk_width)
        else:
            self.q_proj = nn.Sequential(
                Linear(hidden, attention.q_lora_rank),
                RMSNorm(attention.q_lora_rank, config.norm_eps, self._latent_scale(hidden, attention.q_lora_rank)),
                Linear(attention.q_lora_rank, heads * qk_width),
            )
        self.kv_down = Linear(hidden, attention.kv_lora_rank + attention.qk_rope_head_dim)
        latent_scale = self._latent_scale(hidden, attention.kv_lora_rank)
        self.kv_norm = RMSNorm(attention.kv_lora_rank, config.norm_eps, latent_scale)
        self.kv_up = Linear(attention.kv_lora_rank, heads * (attention.qk_nope_head_dim + attention.v_head_dim))
        self.out_proj = Linear(heads * attention.v_head_dim, hidden)
        self.attend = SoftmaxAttention()
        self.q_norm, self.k_norm = _head_norms(qk_width, config)

    def _latent_scale(self, hidden: int, rank: int) -> float:
        """A latent of R of D dimensions gives products of the variance that D dimensions would give."""
        return math.sqrt(hidden / rank) if self.config.scale_latents else 1.0

    def forward(self, x_BSD: torch.Tensor, mask_B1SS: torch.Tensor | None = None) -> torch.Tensor:
        """[B, S, D] -> [B, S, D]; without a mask, causal."""
        y: torch.Tensor = self.out_proj(self.attend(*self.project(x_BSD), mask_B1SS))
        return y

    def project(self, x_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries and keys [B, H, S, N + R] as their products are taken, values [B, H, S, V]."""
        c = self.config
        heads = (c.num_heads, -1)
        turns = rotary_turns(x_BSD.shape[1], c.qk_rope_head_dim, self.rope_theta, x_BSD.device, c.qk_nope_head_dim)
        q_BHSK = rotate(self.q_norm(self.q_proj(x_BSD).unflatten(-1, heads)).transpose(1, 2), turns)
        latent_BSC, k_rope_BSR = self.kv_down(x_BSD).split((c.kv_lora_rank, c.qk_rope_head_dim), dim=-1)
        kv_BHS = self.kv_up(self.kv_norm(latent_BSC)).unflatten(-1, heads).transpose(1, 2)
        k_nope, v_BHSV = kv_BHS.split((c.qk_nope_head_dim, c.v_head_dim), dim=-1)
        k_rope = k_rope_BSR.unsqueeze(1)
        if c.qk_norm:
            k_BHSK = torch.cat((k_nope, k_rope.expand(-1, c.num_heads, -1, -1)), dim=-1)
            return q_BHSK, rotate(self.k_norm(k_BHSK), turns), v_BHSV
        # The shared part is turned once, not once for each head.
        k_rope = rotate(k_rope, turns[:, c.qk_nope_head_dim // 2 :]).expand(-1, c.num_heads, -1, -1)
        return q_BHSK, torch.cat((k_nope, k_rope), dim=-1), v_BHSV

    def logit_exponents(self) -> dict[str, list[float]]:
        """For each weight that makes logits, the power of g that multiplies a head's rows to multiply its logits by g.

        All heads share the rotary part of the keys, so g goes to that of the queries. Without ``qk_norm``.
        """
        c = self.config
        queries = "q_proj.weight" if c.q_lora_rank is None else "q_proj.2.weight"
        return {
            queries: [0.5] * c.qk_nope_head_dim + [1.0] * c.qk_rope_head_dim,
            "kv_up.weight": [0.5] * c.qk_nope_head_dim + [0.0] * c.v_head_dim,
        }


class MultiHeadAttention(nn.Module):
    """Plain multi-head attention, rotary position on the whole head.

    With ``qk_norm`` each query head and each key head is normed before rotary position, with gains that all heads share
    (as in Qwen3; OLMo 2, arXiv 2501.00656, norms all heads together).
    """

    def __init__(self, config: ModelConfig, attention: MhaConfig) -> None:
        super().__init__()
        self.config = attention
        self.rope_theta = config.rope_theta
        width = attention.num_heads * attention.head_dim
        self.q_proj = Linear(config.hidden_size, width)
        self.k_proj = Linear(config.hidden_size, width)
        self.v_proj = Linear(config.hidden_size, width)
        self.out_proj = Linear(width, config.hidden_size)
        self.attend = SoftmaxAttention()
        self.q_norm, self.k_norm = _head_norms(attention.head_dim, config)

    def forward(self, x_BSD: torch.Tensor, mask_B1SS: torch.Tensor | None = None) -> torch.Tensor:
        """[B, S, D] -> [B, S, D]; without a mask, causal."""
        y: torch.Tensor = self.out_proj(self.attend(*self.project(x_BSD), mask_B1SS))
        return y

    def project(self, x_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, each [B, H, S, head_dim], as their products are taken."""
        heads = (self.config.num_heads, -1)
        q, k, v = (proj(x_BSD).unflatten(-1, heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        turns = rotary_turns(x_BSD.shape[1], self.config.head_dim, self.rope_theta, x_BSD.device)
        q_BHSK, k_BHSK = (rotate(x.transpose(1, 2), turns) for x in (self.q_norm(q), self.k_norm(k)))
        return q_BHSK, k_BHSK, v.transpose(1, 2)

    def logit_exponents(self) -> dict[str, list[float]]:
        """For each weight that makes logits, the power of g that multiplies a head's rows to multiply its logits by g.

        Without ``qk_norm``.
        """
        return {name: [0.5] * self.config.head_dim for name in ("q_proj.weight", "k_proj.weight")}


Attention = LatentAttention | MultiHeadAttention


def build_attention(config: ModelConfig) -> Attention:
    """The attention that ``model.attention.kind`` names."""
    match config.attention:
        case MlaConfig() as attention:
            return LatentAttention(config, attention)
        case MhaConfig() as attention:
            return MultiHeadAttention(config, attention)
        case other:
            assert_never(other)
